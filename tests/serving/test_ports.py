"""Who may reach a server: addresses and keys at the start, host names, listeners, reloading."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from serving.config import ServeFlags
from serving.errors import UserError
from serving.keys import KeyStore, parse
from serving.listener import bind
from serving.ports import PortRules, admin_rules, api_rules, host_name, is_local_address
from tests.serving.raw import request, send
from tests.serving.servers import REPOSITORY, running_server

KEY, OTHER_TENANT, ADMIN_KEY = "client-" * 4, "initech-" * 4, "operator-" * 4
ENVIRON = {"HOCKET_API_KEYS": f"acme: {KEY}"}
LOCAL = ("127.0.0.1", "127.0.0.53", "::1", "localhost")
REMOTE = ("0.0.0.0", "::", "", "0", "10.0.0.1", "example.org", "::ffff:127.0.0.1", "127.1")


@pytest.mark.parametrize(
    ("host", "keys", "insecure"),
    list(itertools.product(LOCAL + REMOTE, (False, True), (False, True))),
)
def test_the_start_matrix(host, keys, insecure):
    flags, environ = ServeFlags(host=host, insecure=insecure), dict(ENVIRON) if keys else {}
    if host in REMOTE and not keys and not insecure:
        with pytest.raises(UserError, match="not a loopback address") as error:
            api_rules(flags, environ)
        assert "--insecure" in error.value.remedy
        return
    rules = api_rules(flags, environ)
    assert (rules.keys is not None) == keys
    assert rules.any_host == (host in REMOTE and not keys)


def test_the_admin_port_has_keys_of_its_own():
    api = api_rules(ServeFlags(), dict(ENVIRON))
    flags = ServeFlags(admin_port=0)
    assert admin_rules(flags, {}, PortRules()).keys is None
    with pytest.raises(UserError, match="the admin port has none"):
        admin_rules(flags, {}, api)
    with pytest.raises(UserError, match="an admin key too"):
        admin_rules(flags, {"HOCKET_ADMIN_KEYS": f"op: {KEY}"}, api)
    rules = admin_rules(flags, {"HOCKET_ADMIN_KEYS": f"op: {ADMIN_KEY}"}, api)
    assert (rules.tenant_of(ADMIN_KEY), rules.tenant_of(KEY)) == ("op", None)
    with pytest.raises(UserError, match="needs an admin port"):
        admin_rules(ServeFlags(admin_keys=Path("x")), {}, api)


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("localhost:8000", "localhost"),
        ("LocalHost.", "localhost"),
        ("[::1]:8000", "::1"),
        ("127.0.0.1", "127.0.0.1"),
        ("", ""),
        ("localhost:x", ""),
        ("user@localhost", ""),
        ("localhost/path", ""),
        ("localhost, evil", ""),
        ("::1", ""),
        ("localhost:80:80", ""),
    ],
)
def test_host_names_are_read(header, name):
    assert host_name(header) == name


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1:1", "[::1]:1", "a.localhost", "127.9.9.9"]
)
def test_loopback_names_are_always_allowed(host):
    for rules in (PortRules(), PortRules(hosts=frozenset({"llm.example.org"}))):
        assert rules.allows_host(host, has_key=False)


@pytest.mark.parametrize(
    "host",
    ["evil.com", "localhost.evil.com", "127.0.0.1.nip.io", "evil-localhost", "10.0.0.1", "", "0"],
)
def test_other_names_need_a_key_or_a_word(host):
    assert not PortRules().allows_host(host, has_key=False)
    keyed = PortRules(KeyStore(parse(f"a: {KEY}", "f")))
    assert keyed.allows_host(host, has_key=True)
    assert not keyed.allows_host(host, has_key=False)
    assert PortRules(any_host=True).allows_host(host, has_key=False)
    named = PortRules(keyed.keys, frozenset({"llm.example.org"}))
    assert not named.allows_host(host, has_key=True)
    assert named.allows_host("LLM.example.org:443", has_key=False)


def test_an_allowed_host_is_a_name():
    with pytest.raises(UserError, match="no host name"):
        api_rules(ServeFlags(allowed_hosts=("https://llm.example.org",)), {})
    flags = ServeFlags(host="0.0.0.0", insecure=True, allowed_hosts=("llm.example.org",))
    assert not api_rules(flags, {}).any_host


@pytest.mark.parametrize(
    ("address", "local"),
    [("127.0.0.1", True), ("::1", True), ("::ffff:127.0.0.1", True), ("10.1.2.3", False),
     ("::", False), ("", False), ("/run/sock", False)],
)  # fmt: skip
def test_local_addresses(address, local):
    assert is_local_address(address) == local


def test_answers_do_not_wait_for_acknowledgements():
    """The protocol is said, so that asyncio sets TCP_NODELAY on what it accepts."""
    for host in ("127.0.0.1", "::1"):
        try:
            listener = bind(host, 0)
        except UserError:
            continue  # a machine without IPv6
        assert listener.proto == socket.IPPROTO_TCP
        listener.close()


# --- real servers ---


def listeners(pid: int) -> set[tuple[str, int]]:
    """Return the addresses that a process listens on, as the kernel tells."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(entry.readlink())
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = set()
    for family, name in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:  # LISTEN
                address, port = fields[1].split(":")
                packed = bytes.fromhex(address)
                words = [packed[at : at + 4][::-1] for at in range(0, len(packed), 4)]
                found.add((socket.inet_ntop(family, b"".join(words)), int(port, 16)))
    return found


def port_of(url: str) -> int:
    return int(url.rsplit(":", 1)[1])


def admin_url(server):
    return server.admin_url


def test_with_keys_on_every_address(tmp_path):
    """One server, all of it: listeners, both planes, tenants, rotation by signal and by file."""
    path = tmp_path / "keys"
    path.write_text(f"acme: {KEY}\ninitech: {OTHER_TENANT}\n")
    path.chmod(0o600)
    environ = {"HOCKET_ADMIN_KEYS": f"op: {ADMIN_KEY}"}
    flags = ("--fake", "--host", "0.0.0.0", "--api-keys", str(path), "--admin-port", "0")
    with running_server(*flags, env=environ) as server:
        url = f"http://127.0.0.1:{port_of(server.url)}"
        assert listeners(server.process.pid) == {
            ("0.0.0.0", port_of(server.url)),
            ("127.0.0.1", port_of(admin_url(server))),
        }
        assert "2 API keys " in server.block
        assert "Bearer $KEY" in server.block
        for secret in (KEY, ADMIN_KEY):
            assert secret.encode() not in Path(f"/proc/{server.process.pid}/cmdline").read_bytes()

        def status(key, method="GET", target="/v1/models", to=url):
            headers = {"Authorization": f"Bearer {key}"}
            return send(to, request(method, target, headers=headers)).status

        # Clients' keys open the API, operators' the admin plane, and neither the other's.
        assert [status(KEY), status(ADMIN_KEY), status("none")] == [200, 401, 401]
        admin = admin_url(server)
        for target, method in (("/debug/state", "GET"), ("/admin/drain", "POST")):
            assert status(KEY, method, target, admin) == 401
            assert status(ADMIN_KEY, method, target, url) == 401
            assert status(KEY, method, target, url) == 404
        assert status(ADMIN_KEY, "GET", "/debug/state", admin) == 200
        assert status("none", "GET", "/health", admin) == 401

        # One tenant's computed prompt is nobody else's to find, whatever salt they give.
        def num_cached(key, **more):
            body = json.dumps({"prompt": "x" * 200, "max_tokens": 1} | more).encode()
            headers = {"Authorization": f"Bearer {key}"}
            answer = send(url, request("POST", "/v1/completions", body, headers))
            return json.loads(answer.body)["usage"]["prompt_tokens_details"]["cached_tokens"]

        assert num_cached(KEY) == 0
        assert num_cached(KEY) > 0
        assert num_cached(OTHER_TENANT) == num_cached(OTHER_TENANT, cache_salt="acme") == 0
        assert num_cached(OTHER_TENANT, cache_salt="acme") > 0
        assert num_cached(KEY, cache_salt="acme") == 0

        # A new key beside the old one, by signal; then the old one goes, by time.
        other = "another-" * 4
        path.write_text(f"acme: {KEY}\nacme: {other}\n")
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: status(other) == 200)
        assert status(KEY) == 200
        path.write_text(f"acme: {other}\n")
        wait_until(lambda: status(KEY) == 401)
        assert status(other) == 200

        # Off loopback the probes need a key too; over loopback they do not.
        outside = outside_address()
        if outside:
            away = f"http://{outside}:{port_of(server.url)}"
            assert send(away, request("GET", "/health")).status == 401
            assert status(other, "GET", "/health", away) == 200
        assert send(url, request("GET", "/health")).status == 200
        assert server.terminate() == 0


def outside_address() -> str | None:
    """Return an address of this machine that is not loopback, None if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing; the kernel picks the address
        except OSError:
            return None
        address = str(probe.getsockname()[0])
    return None if address.startswith("127.") else address


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


def test_what_cannot_start_says_why_and_how():
    command = [sys.executable, "-c", "from serving.cli import main; main()", "serve", "--fake"]
    done = subprocess.run(
        [*command, "--host", "0.0.0.0", "--port", "0"],
        capture_output=True, text=True, cwd=REPOSITORY, timeout=60, check=False,
        env={name: text for name, text in os.environ.items() if not name.startswith("HOCKET_")},
    )  # fmt: skip
    assert done.returncode == 1
    assert "there are no API keys" in done.stderr
    assert "Traceback" not in done.stderr


def test_web_pages_reach_neither_port_of_a_server_without_keys():
    """DNS rebinding carries a foreign Host, a page's own request a foreign Origin."""
    with running_server("--fake", "--admin-port", "0") as server:
        ours = {("127.0.0.1", port_of(url)) for url in (server.url, admin_url(server))}
        assert listeners(server.process.pid) == ours
        assert "no API keys" in server.block
        body = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
        for headers in (
            {"Host": "evil.example:80"},
            {"Host": ""},
            {"Origin": "http://evil.example"},
            {"Origin": "null"},
            {"Origin": "http://localhost.evil.example"},
            {"Origin": "http://[broken"},
        ):
            for data in (
                request("POST", "/v1/completions", body, headers),
                request("GET", "/health", headers=headers),
                request("GET", "/nothing", headers=headers),
            ):
                answer = send(server.url, data)
                assert (answer.status, answer.error["code"]) == (403, "host_not_allowed")
            drain = send(admin_url(server), request("POST", "/admin/drain", headers=headers))
            assert drain.status == 403
        for headers in ({"Host": "localhost"}, {"Origin": "http://localhost:3000"}):
            data = request("POST", "/v1/completions", body, headers)
            assert send(server.url, data).status == 200

        # Drain: what comes now is refused, and the process stays until it is told to go.
        answer = send(admin_url(server), request("POST", "/admin/drain"))
        assert (answer.status, json.loads(answer.body)["status"]) == (200, "drained")
        assert send(server.url, request("GET", "/ready")).status == 503
        assert send(server.url, request("GET", "/health")).status == 200
        answer = send(server.url, request("POST", "/v1/completions", body))
        assert (answer.status, answer.error["code"]) == (503, "draining")
        assert server.terminate() == 0
