"""API keys: read from a file or the environment, kept as digests, looked up in constant time.

A text of keys is lines of `tenant: key`, or JSON `{"tenant": "key" or ["key", ...]}`. A tenant may
have several, so that an old one works until everybody has the new one. Nothing here ever shows,
logs or keeps a key itself, and no flag takes one: other users of the machine can read the flags.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import os
import re
import signal
import stat
from collections.abc import AsyncIterator, Iterable, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from serving.errors import UserError

log = logging.getLogger(__name__)

DEFAULT_TENANT = "default"  # of every request, where no keys are configured

MAX_FILE_BYTES = 1 << 20
MAX_KEYS = 10_000
MIN_KEY_CHARS, MAX_KEY_CHARS = 16, 512
_POLL_S = 1.0

_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEY = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # what RFC 6750 lets follow `Bearer`

_FORM = 'write one `tenant: key` a line, or JSON {"tenant": ["key", ...]}'
_GOOD_KEY = "make one with: python3 -c 'import secrets; print(secrets.token_urlsafe(32))'"


@dataclass(frozen=True, slots=True)
class Keys:
    """Digests and whose they are. SHA-256 is enough: keys are long and random, not passwords."""

    entries: tuple[tuple[bytes, str], ...]

    def tenant_of(self, presented: str) -> str | None:
        """Return the tenant that the key belongs to, None if it is nobody's.

        Every entry is compared, whether one has matched or not: the time tells nothing.
        """
        digest = _digest(presented)
        found: str | None = None
        for known, tenant in self.entries:
            if hmac.compare_digest(known, digest):
                found = tenant
        return found

    @property
    def num_tenants(self) -> int:
        return len({tenant for _, tenant in self.entries})


class KeyStore:
    """The keys in force. A file is read again when it changes; a bad one changes nothing."""

    def __init__(self, keys: Keys, path: Path | None = None) -> None:
        self.keys = keys
        self._path = path
        self._seen = None if path is None else _signature(path)

    @property
    def reloads(self) -> bool:
        return self._path is not None

    def reload(self) -> None:
        """Read the file again; what is wrong with it goes to the log, and the old keys stay."""
        if self._path is None:
            return
        self._seen = _signature(self._path)
        try:
            self.keys = read_file(self._path)
        except UserError as error:
            log.error("the old API keys stay in force: %s; %s", error.cause, error.remedy)
            return
        num_keys, num_tenants = len(self.keys.entries), self.keys.num_tenants
        log.warning("API keys were read again: %d of %d tenants", num_keys, num_tenants)

    async def watch(self) -> None:
        """Look every second whether the file has changed; ends when cancelled."""
        while self._path is not None:
            await asyncio.sleep(_POLL_S)
            if _signature(self._path) != self._seen:
                self.reload()


@contextlib.asynccontextmanager
async def watched(*stores: KeyStore | None) -> AsyncIterator[None]:
    """Read files of keys again when they change, and at SIGHUP, while the block runs."""
    loop = asyncio.get_running_loop()
    files = [store for store in stores if store is not None and store.reloads]
    if not files:
        yield
        return

    def reload() -> None:
        for store in files:
            store.reload()

    loop.add_signal_handler(signal.SIGHUP, reload)
    watches = [loop.create_task(store.watch()) for store in files]
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
        for watch in watches:
            watch.cancel()


def open_store(path: Path | None, environ: MutableMapping[str, str], name: str) -> KeyStore | None:
    """Return the keys of the file or of the variable `name`, None if neither is given.

    The variable is taken out of `environ`, so that child processes do not inherit it. Raises
    UserError.
    """
    text = environ.pop(name, None)
    if text is not None and path is not None:
        raise UserError(
            f"there are two sources of keys: {path} and the variable {name}", "give only one"
        )
    if path is not None:
        return KeyStore(read_file(path), path)
    if text is None:
        return None
    is_json = text.lstrip().startswith("{")
    return KeyStore(parse(text if is_json else text.replace(",", "\n"), name))


def read_file(path: Path) -> Keys:
    """Return the keys of a file that only its owner and group may read. Raises UserError."""
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UserError(
            f"cannot read the keys in {path}: {error.strerror}", "check the path and its owner"
        ) from error
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is not a file", _FORM)
    if mode & stat.S_IRWXO:
        raise UserError(
            f"every user of this machine may read or change the keys in {path}", f"chmod 600 {path}"
        )
    if len(data) > MAX_FILE_BYTES:
        raise UserError(f"{path} is larger than {MAX_FILE_BYTES} bytes", _FORM)
    try:
        return parse(data.decode(), str(path))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text", _FORM) from None


def parse(text: str, source: str) -> Keys:
    """Return the keys of a text. Raises UserError, which names places and never quotes."""
    pairs = _json_pairs(text, source) if text.lstrip().startswith("{") else _lines(text, source)
    owners: dict[bytes, str] = {}
    for place, tenant, key in pairs:
        if not _TENANT.fullmatch(tenant):
            raise UserError(
                f"{source}, {place}: this is no name of a tenant",
                "use at most 64 letters, digits, dots, dashes and underscores",
            )
        if not MIN_KEY_CHARS <= len(key) <= MAX_KEY_CHARS or not _KEY.fullmatch(key):
            raise UserError(
                f"{source}, {place}: a key has {MIN_KEY_CHARS} to {MAX_KEY_CHARS} letters, digits "
                "and -._~+/",
                _GOOD_KEY,
            )
        if owners.setdefault(_digest(key), tenant) != tenant:
            raise UserError(
                f"{source}, {place}: this key belongs to another tenant already", _GOOD_KEY
            )
    if not owners:
        raise UserError(f"{source} holds no key", _FORM)
    if len(owners) > MAX_KEYS:
        raise UserError(f"{source} holds more than {MAX_KEYS} keys", "remove those not in use")
    return Keys(tuple(owners.items()))


def _lines(text: str, source: str) -> Iterable[tuple[str, str, str]]:
    for number, line in enumerate(text.splitlines(), start=1):
        bare = line.strip()
        if not bare or bare.startswith("#"):
            continue
        tenant, colon, key = bare.partition(":")
        if not colon:
            raise UserError(f"{source}, entry {number} has no colon", _FORM)
        yield f"entry {number}", tenant.strip(), key.strip()


def _json_pairs(text: str, source: str) -> Iterable[tuple[str, str, str]]:
    try:
        value = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError):
        raise UserError(f"{source} is not valid JSON", _FORM) from None
    for number, (tenant, given) in enumerate(value, start=1):
        for key in given if isinstance(given, list) else [given]:
            if not isinstance(key, str):
                raise UserError(f"{source}, tenant {number}: a key is a string", _FORM)
            yield f"tenant {number}", tenant, key


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _signature(path: Path) -> tuple[int, int, int] | None:
    """Return what changes when the file, or the one that a link points to, is written anew."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
