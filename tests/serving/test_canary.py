"""A prompt and a key that must be seen nowhere but in the client's own answer."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from serving.api.json_limits import JsonRoute
from tests.serving.quoting_instance import BREAKS, FAILS, PRELUDE
from tests.serving.raw import connect, request, send
from tests.serving.servers import running_server
from tests.serving.test_bad_requests import routes

PROMPT = "canary-prompt-7f3a"
KEY = "canary-key-91c2-0123456789abcdef"
WRONG_KEY = "canary-wrong-key-55aa-0123456789"
ADMIN_KEY = "canary-admin-key-44bb-0123456789"
CANARIES = (PROMPT, KEY, WRONG_KEY, ADMIN_KEY)


def bodies():
    prompt = {"prompt": PROMPT, "max_tokens": 3}
    chat = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 3}
    for path, body in (("/v1/completions", prompt), ("/v1/chat/completions", chat)):
        for more in (
            {}, {"stream": True}, {"temperature": "hot"}, {"n": 0}, {"stop": [PROMPT] * 5},
            {"bad_words": [PROMPT] * 65}, {"user": PROMPT, "metadata": {PROMPT: PROMPT}},
            {"cache_salt": PROMPT}, {"logit_bias": {"x": 1}}, {"tools": [PROMPT]},
        ):  # fmt: skip
            yield path, json.dumps(body | more).encode()
    for path in ("/v1/completions", "/v1/chat/completions"):
        yield path, f'{{"prompt": "{PROMPT}", "messages": "{PROMPT}'.encode()
        yield path, f'{{"prompt": "{PROMPT}\\ud800", "messages": "{PROMPT}"}}'.encode()
        yield path, f'["{PROMPT}"]'.encode()
    yield "/v1/completions", json.dumps({"prompt": PROMPT * 20_000}).encode()


def test_prompts_and_keys_are_seen_nowhere(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"acme: {KEY}\n")
    path.chmod(0o600)
    environ = {"HOCKET_ADMIN_KEYS": f"op: {ADMIN_KEY}"}
    flags = ("--fake", "--api-keys", str(path), "--admin-port", "0")
    with running_server(*flags, env=environ) as server:
        seen = [server.block]
        for target, body in bodies():
            for key in (KEY, WRONG_KEY):
                headers = {"Authorization": f"Bearer {key}"}
                answer = send(server.url, request("POST", target, body, headers))
                if answer.status != 200:
                    assert answer.error
                    seen.append(answer.body.decode())
        # What clients name themselves, with what terminals obey and logs split at.
        for odd in ("%0aFAKE LINE", "%1b%5b31m", PROMPT):
            headers = {"Authorization": f"Bearer {KEY}", "X-Request-Id": odd, "User-Agent": odd}
            send(server.url, request("GET", f"/{odd}?key={WRONG_KEY}", headers=headers))
        # A client that leaves, a body that breaks off, no HTTP at all.
        with connect(server.url) as raw:
            headers = {"Authorization": f"Bearer {KEY}"}
            body = json.dumps({"prompt": PROMPT, "max_tokens": 5000, "stream": True}).encode()
            raw.sendall(request("POST", "/v1/completions", body, headers))
            raw.recv(1)
        with connect(server.url) as raw:
            raw.sendall(request("POST", "/v1/completions", body, headers)[:-5])
        send(server.url, f"{PROMPT} {KEY}\r\n\r\n".encode())

        authorized = {"Authorization": f"Bearer {KEY}"}
        seen.append(send(server.url, request("GET", "/metrics", headers=authorized)).body.decode())
        admin = server.block.partition("Admin: ")[2].split()[0]
        authorized = {"Authorization": f"Bearer {ADMIN_KEY}"}
        state = send(admin, request("GET", "/debug/state", headers=authorized))
        assert state.status == 200
        seen.append(state.body.decode())

        path.write_text(f"broken {KEY}\n")  # what the reload says of it
        server.process.send_signal(1)
        server.process.terminate()
        out, err = server.process.communicate(timeout=30)
        assert server.process.returncode == 0
        seen += [out, err]
        assert "FAKE LINE" not in out + err
        assert "\x1b" not in out + err
    for canary in CANARIES:
        for text in seen:
            assert canary not in text, text[:500]


@pytest.mark.parametrize("level", ["info", "debug"])
def test_what_a_model_raises_is_quoted_at_debug_only(level):
    with running_server("--fake", "--log-level", level, prelude=PRELUDE) as server:
        answers = []
        for how, code in ((FAILS, "generation_failed"), (BREAKS, "request_quarantined")):
            body = json.dumps({"prompt": f"{PROMPT} {how}", "max_tokens": 3}).encode()
            answer = send(server.url, request("POST", "/v1/completions", body))
            assert (answer.status, answer.error["code"]) == (500, code)
            answers.append(answer.body.decode())
        server.process.terminate()
        out, err = server.process.communicate(timeout=30)
    for text in answers:
        for told in (PROMPT, "ValueError", "InvariantError", ".py", "/"):
            assert told not in text
    for error in ("ValueError (", "InvariantError ("):
        assert error in err, "the log says what it was"
    assert err.count("quoting_instance.py:") >= 2, "and where"
    assert PROMPT not in out
    assert (PROMPT in err) == (level == "debug")


def test_no_flag_takes_a_key():
    command = [sys.executable, "-c", "from serving.cli import main; main()", "serve", "--fake"]
    done = subprocess.run(
        [*command, "--api-keys", f"acme: {KEY}"], capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "cannot read the keys" in done.stderr


def test_every_route_with_a_body_reads_it_strictly():
    posts = [route for route in routes() if getattr(route, "body_field", None) is not None]
    assert posts
    for route in posts:
        assert isinstance(route, JsonRoute), f"{route.path}: APIRouter(route_class=JsonRoute)"
