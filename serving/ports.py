"""Who may speak to a listening port: its keys, and the names under which it may be called.

Decides both from the flags and the environment before anything slow happens. It knows no HTTP.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass
from functools import lru_cache

from serving.config import ServeFlags
from serving.errors import UserError
from serving.keys import KeyStore, open_store
from serving.listener import is_loopback

API_KEYS = "HOCKET_API_KEYS"
ADMIN_KEYS = "HOCKET_ADMIN_KEYS"

_HOST = re.compile(r"(?:\[([0-9a-fA-F:.]{2,45})\]|([A-Za-z0-9._-]{1,253}))(?::[0-9]{1,5})?")


@dataclass(frozen=True, slots=True)
class PortRules:
    """The rules of one port.

    A web page can make a browser send requests to loopback, under a name of its own choice (DNS
    rebinding). So whoever shows no key must call the server by a loopback name, or one of `hosts`.
    """

    keys: KeyStore | None = None  # None: whoever reaches the port may ask
    hosts: frozenset[str] = frozenset()  # if there are any, everybody must use one, key or not
    any_host: bool = False

    def tenant_of(self, key: str) -> str | None:
        return None if self.keys is None else self.keys.keys.tenant_of(key)

    def allows_host(self, header: str, *, has_key: bool) -> bool:
        """Whether a request with this `Host` may be answered."""
        if not self.hosts and (has_key or self.any_host):
            return True
        name = host_name(header)
        return is_local_name(name) or name in self.hosts


@dataclass(frozen=True, slots=True)
class Port:
    """A bound socket and its rules."""

    listener: socket.socket
    rules: PortRules


def host_name(header: str) -> str:
    """Return a Host header without its port, in lower case; empty if it is no host."""
    match = _HOST.fullmatch(header)
    return (match[1] or match[2]).rstrip(".").lower() if match else ""


@lru_cache(maxsize=64)
def is_local_name(name: str) -> bool:
    return name.endswith(".localhost") or is_loopback(name)


def is_local_address(address: str) -> bool:
    """Whether a connection to this address of ours can only come from this machine."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback


def api_rules(flags: ServeFlags, environ: MutableMapping[str, str]) -> PortRules:
    """Return the rules of the API's port. Raises UserError for one that anybody could use."""
    keys = open_store(flags.api_keys, environ, API_KEYS)
    local = is_loopback(flags.host)
    if keys is None and not local and not flags.insecure:
        raise UserError(
            f"{flags.host} is not a loopback address, and there are no API keys",
            f"give --api-keys FILE or {API_KEYS}, or serve whoever reaches it with --insecure",
        )
    hosts = frozenset(host_name(host) for host in flags.allowed_hosts)
    if "" in hosts:
        raise UserError(
            "--allowed-hosts holds something that is no host name",
            "give names such as llm.example.org, without scheme or path",
        )
    return PortRules(keys, hosts, any_host=keys is None and not local and not hosts)


def admin_rules(flags: ServeFlags, environ: MutableMapping[str, str], api: PortRules) -> PortRules:
    """Return the rules of the admin port. Raises UserError if clients' keys would open it."""
    if flags.admin_port is None:
        environ.pop(ADMIN_KEYS, None)
        if flags.admin_keys is not None:
            raise UserError("--admin-keys needs an admin port", "add --admin-port PORT")
        return PortRules()
    keys = open_store(flags.admin_keys, environ, ADMIN_KEYS)
    if keys is None and api.keys is not None:
        raise UserError(
            "the API has keys, and the admin port has none",
            f"give --admin-keys FILE or {ADMIN_KEYS}, with other keys than the API's",
        )
    if keys is not None and api.keys is not None:
        shared = {digest for digest, _ in keys.keys.entries}
        if any(digest in shared for digest, _ in api.keys.keys.entries):
            raise UserError(
                "an API key is an admin key too", "give operators keys that no client has"
            )
    return PortRules(keys)
