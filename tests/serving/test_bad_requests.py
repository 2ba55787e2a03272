"""Some 400 bad requests, each with its exact status and the whole error object; none is a 500.

Tables of (body, param), so that a new field is a new line. After each table a good request is
served. One server for all, with keys, so that whoever gets past them would be seen.
"""

from __future__ import annotations

import itertools
import json
import re
import time
from types import SimpleNamespace

import pytest
from starlette.routing import Match

from engine.config import EngineConfig
from serving.api.app import create_app
from serving.config import ServeConfig
from serving.metrics import Metrics
from serving.ports import PortRules
from tests.serving.raw import connect, receive, request, send
from tests.serving.servers import running_server

KEY = "a-key-of-forty-characters-0123456789abcd"
AUTHORIZED = {"Authorization": f"Bearer {KEY}"}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BASE = {
    COMPLETIONS: {"prompt": "x", "max_tokens": 2, "ignore_eos": True},
    CHAT: {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "ignore_eos": True},
}
VOCAB_SIZE = 258  # of --fake: bytes and two special tokens
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def slowest():
    times = {}
    yield times
    if times:
        name = max(times, key=times.get)
        print(f"\n{len(times)} bad requests; the slowest answer took {times[name]:.3f} s: {name}")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"someone: {KEY}\n")
    keys.chmod(0o600)
    with running_server("--fake", "--api-keys", str(keys)) as server:
        yield server


@pytest.fixture(scope="module", autouse=True)
def metrics_do_not_grow(server):
    """Thousands of odd methods and paths later, the page has no line that honest use lacks."""
    check_served(server)
    before = metric_names(server)
    yield
    check_served(server)
    grown = {name for name in metric_names(server) - before if not BOUNDED.match(name)}
    assert grown <= HONEST_OUTCOMES


def metric_names(server):
    page = send(server.url, request("GET", "/metrics", headers=AUTHORIZED)).body.decode()
    return {line.rsplit(" ", 1)[0] for line in page.splitlines() if line[0] != "#"}


HONEST_OUTCOMES = {
    f'hocket_requests_{what}{{model="fake",outcome="{outcome}"}}'
    for what in ("total", "created")
    for outcome in ("rejected", "abort", "error", "stop", "length", "timeout")
}


def check_served(server):
    """A good request, right now."""
    body = json.dumps(BASE[COMPLETIONS]).encode()
    answer = send(server.url, request("POST", COMPLETIONS, body, AUTHORIZED))
    assert answer.status == 200, answer.body
    assert json.loads(answer.body)["usage"]["completion_tokens"] == 2


@pytest.fixture(scope="module")
def groups():
    return []


@pytest.fixture
def refused(server, slowest, groups, request):
    """Send a request and check that it is refused exactly so; good ones come between groups."""
    if groups[-1:] != [request.node.originalname]:
        groups.append(request.node.originalname)
        check_served(server)

    def check(data, status, code, *, param=None, method="POST", end=False):
        begun = time.monotonic()
        answer = send(server.url, data, method=method, end=end)
        slowest[f"{request.node.name} {len(slowest)}"] = time.monotonic() - begun
        assert answer.status == status, (data[:200], answer.body[:300])
        assert len(answer.body) < 2500, "a bad body must not make a large answer"
        assert answer.headers["x-request-id"]
        if method != "HEAD":
            error = answer.error
            assert error["code"] == code, (data[:200], error)
            if param is not None:
                assert (error["param"] or "").split(".")[0] == param, (data[:200], error)
        return answer

    return check


def post(path, body):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return request("POST", path, data, AUTHORIZED)


def both(name, *values):
    return [(path, {name: value}, name) for path in (COMPLETIONS, CHAT) for value in values]


def only(path, name, *values):
    return [(path, {name: value}, name) for value in values]


# --- fields: types and bounds ---

NO_NUMBER: tuple[object, ...] = ("1", [], {}, [1])
NOT_FINITE = (NAN, INF, -INF)

TYPES = [
    *(
        case
        for name in ("n", "max_tokens", "min_tokens", "seed", "top_k", "priority")
        for case in both(name, *NO_NUMBER, 1.5, True)
    ),
    *both("prompt_logprobs", "1", 1.5, True, []),
    *(
        case
        for name in (
            "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty",
            "repetition_penalty",
        )
        for case in both(name, *NO_NUMBER, True, *NOT_FINITE)
    ),
    *(
        case
        for name in ("stream", "ignore_eos", "return_token_ids")
        for case in both(name, "true", 1, [], {})
    ),
    *both("model", 3, [], {}, True),
    *both("stop", 3, {}, True, [3], [None], [["x"]]),
    *both("stop_token_ids", 3, "x", {}, ["3"], [1.5], [None]),
    *both("logit_bias", 3, "x", [], [[3, 1]], {"3": "x"}, {"3": None}, {"3": []}, {"3": NAN}),
    *both("bad_words", "x", 3, {}, [3], [None]),
    *both("allowed_token_ids", 3, "x", {}, ["3"], [1.5]),
    *both("cache_salt", 3, [], {}, True),
    *both("stream_options", "x", 3, []),
    *only(COMPLETIONS, "prompt", None, {}, 1.5, True, ["a", 1], [1.5], [None], [[None]], [{}]),
    *only(COMPLETIONS, "echo", 1, "true", []),
    *only(COMPLETIONS, "logprobs", "1", 1.5, True, []),
    *only(CHAT, "messages", None, {}, "hi", 3, ["hi"], [[]], [None], [3]),
    *only(CHAT, "max_completion_tokens", "1", 1.5, True, []),
    *only(CHAT, "logprobs", 1, "true", []),
    *only(CHAT, "top_logprobs", "1", 1.5, True, []),
    *[
        (CHAT, {"messages": [message]}, "messages")
        for message in (
            {}, {"content": "x"}, {"role": 3, "content": "x"}, {"role": "", "content": "x"},
            {"role": "user", "content": 3}, {"role": "user", "content": {}},
            {"role": "user", "content": [3]}, {"role": "user", "content": [{}]},
            {"role": "user", "content": [{"type": "text"}]},
            {"role": "user", "content": [{"type": "text", "text": 3}]},
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            {"role": "x" * 65, "content": "x"},
        )
    ],
]  # fmt: skip

BOUNDS = [
    *both("n", 0, -1, 9, 2**31, 2**53 + 1, 10**400),
    *both("max_tokens", -1, -(2**53)),
    *both("min_tokens", -1, 3, 2**53),
    *both("seed", 2**63, -(2**63) - 1, 10**400),
    *both("top_k", -2, 2**31),
    *both("temperature", -0.1, 2.1, 1e308),
    *both("top_p", 0, -0.1, 1.1),
    *both("min_p", -0.1, 1.1),
    *both("presence_penalty", -2.1, 2.1, 1e308),
    *both("frequency_penalty", -2.1, 2.1, 1e308),
    *both("repetition_penalty", 0, -1, 101, 1e308),
    *both("stop", "", [""], ["x"] * 5, "x" * 257, ["x" * 257]),
    *both("stop_token_ids", [-1], [2**63], list(range(33))),
    *both(
        "logit_bias",
        {"-1": 1}, {str(VOCAB_SIZE): 1}, {str(2**63): 1}, {"x": 1}, {"": 1}, {"3": 100.1},
        {"3": -100.1}, {"9" * 5000: 1}, {str(number): 1 for number in range(1025)},
    ),
    *both("bad_words", [""], ["x" * 129], ["x"] * 65),
    *both("allowed_token_ids", [], [-1], [VOCAB_SIZE], [2**63]),
    *both("prompt_logprobs", -1, 21),
    *both("priority", 1, 2**31, -(2**31) - 1),
    *both("cache_salt", "", "x" * 257),
    *only(COMPLETIONS, "prompt", [], [[]], [-1], [VOCAB_SIZE], [2**63], [[1], [VOCAB_SIZE]]),
    *only(COMPLETIONS, "prompt", ["x"] * 65, ["x", ""]),
    *only(COMPLETIONS, "max_tokens", 0),
    *only(COMPLETIONS, "logprobs", -1, 21, 2**31),
    *only(CHAT, "messages", []),
    *only(CHAT, "max_tokens", 0),
    *only(CHAT, "max_completion_tokens", 0, -1),
    *only(CHAT, "top_logprobs", -1, 21, 2),  # 2: without logprobs
]  # fmt: skip


@pytest.mark.parametrize("table", [TYPES, BOUNDS], ids=["types", "bounds"])
def test_a_bad_value_is_400_and_names_its_field(refused, table):
    for path, body, param in table:
        refused(post(path, BASE[path] | body), 400, "invalid_value", param=param)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_model_that_is_not_there_is_404(refused, path):
    for model in ("gpt-4", "", "fake ", "\x00", "x" * 100_000, "\x1b[31m\n"):
        refused(post(path, BASE[path] | {"model": model}), 404, "model_not_found", param="model")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (path, body, next(iter(body)))
        for path in (COMPLETIONS, CHAT)
        for body in (
            {"best_of": 3}, {"suffix": "x"}, {"tools": [{"type": "function"}]},
            {"tool_choice": "required"}, {"response_format": {"type": "json_object"}},
            {"structured_outputs": {"regex": "(a+)+b"}}, {"guided_regex": "foo**"},
            {"guided_grammar": "x"}, {"use_beam_search": True}, {"chat_template": "{{ 1 }}"},
        )
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(refused, path, body, param):
    answer = refused(post(path, BASE[path] | body), 400, "unsupported_parameter", param=param)
    assert param in answer.error["message"]


# --- bodies that are no good JSON ---

DEEP = 64


def nested(depth, opening=b"[", closing=b"]", inner=b""):
    return b'{"prompt": "x", "y": ' + opening * depth + inner + closing * depth + b"}"


JSON = {
    "empty": b"",
    "blank": b"   ",
    "word": b"hello",
    "open": b"{",
    "open string": b'{"prompt": "x',
    "open escape": b'{"prompt": "x\\',
    "trailing comma": b'{"prompt": "x",}',
    "single quotes": b"{'prompt': 'x'}",
    "two values": b'{"prompt": "x"} {}',
    "comment": b'{"prompt": "x" /* hi */}',
    "null": b"null",
    "list": b"[]",
    "number": b"3",
    "string": b'"x"',
    "bool": b"true",
    "nul": b'{"prompt": "x"}\x00',
    "control character": b'{"prompt": "\x01"}',
    "bom": b'\xef\xbb\xbf{"prompt": "x"}',
    "utf-16": '{"prompt": "x"}'.encode("utf-16"),
    "utf-32": '{"prompt": "x"}'.encode("utf-32-le"),
    "latin-1": '{"prompt": "\xe9"}'.encode("latin-1"),
    "overlong": b'{"prompt": "\xc0\xaf"}',
    "raw surrogate": b'{"prompt": "\xed\xa0\x80"}',
    "lone high surrogate": b'{"prompt": "\\ud800"}',
    "lone low surrogate": b'{"prompt": "x\\udc00y"}',
    "reversed pair": b'{"prompt": "\\udc00\\ud800"}',
    "surrogate in a name": b'{"prompt": "x", "\\ud800": 1}',
    "surrogate in an unknown field": b'{"prompt": "x", "user": {"a": ["\\uDFFF"]}}',
    "surrogate in the model": b'{"prompt": "x", "model": "\\ud83d"}',
    "nan": b'{"prompt": "x", "temperature": NaN}',
    "infinity": b'{"prompt": "x", "temperature": Infinity}',
    "minus infinity": b'{"prompt": "x", "logit_bias": {"3": -Infinity}}',
    "nan in an unknown field": b'{"prompt": "x", "metadata": {"a": [NaN]}}',
    "too large": b'{"prompt": "x", "metadata": 1e999}',
    "long float": b'{"prompt": "x", "metadata": ' + b"9" * 400 + b".5}",
    "long integer": b'{"prompt": "x", "metadata": ' + b"9" * 5000 + b"}",
    "beyond 2^53": b'{"prompt": "x", "metadata": 9007199254740993}',
    "below -2^53": b'{"prompt": "x", "max_tokens": -9007199254740993}',
    "seed in a list": b'{"prompt": "x", "seed": [9223372036854775807]}',
    "hex": b'{"prompt": "x", "seed": 0x10}',
    "plus": b'{"prompt": "x", "seed": +1}',
    "leading zero": b'{"prompt": "x", "seed": 01}',
    "twice": b'{"prompt": "x", "prompt": "y"}',
    "model twice": b'{"model": "fake", "prompt": "x", "model": "other"}',
    "twice, escaped": b'{"prompt": "x", "pr\\u006fmpt": "y"}',
    "twice inside": b'{"prompt": "x", "logit_bias": {"7": 1, "7": 2}}',
    "deep list": nested(DEEP + 1),
    "deep object": nested(DEEP + 1, b'{"a":', b"}", b"1"),
    "deep mixture": nested(DEEP, b'[{"a":', b"}]", b"1"),
    "very deep": nested(100_000),
    "very deep, open": b"[" * 1_000_000,
    "objects, open": b'{"a":' * 200_000,
    "wrong brackets": b'{"prompt": "x"]' + b"[" * 100,
    "many brackets that do not match": b"[}" * 400_000,
    "many quotes": b'"' * 1_000_000,
    "many escaped quotes": b'"' + b'\\"' * 500_000,
    "many escapes": b"\\" * 1_000_000,
}


@pytest.mark.parametrize("name", JSON)
def test_bad_json_is_400(refused, name):
    for path in (COMPLETIONS, CHAT):
        refused(post(path, JSON[name]), 400, "invalid_value")


@pytest.mark.parametrize(
    "body",
    [
        nested(DEEP - 1),
        b'{"prompt": "' + b"[{" * 100 + b'", "max_tokens": 1}',
        b'{"prompt": "\\ud83d\\ude00", "max_tokens": 1}',
        b'{"prompt": "NaN Infinity 9007199254740993 1e999", "max_tokens": 1}',
        b'{"prompt": "x", "max_tokens": 1, "seed": 9223372036854775807}',
        b'{"prompt": "x", "max_tokens": 1, "seed": -9223372036854775808}',
        b'{"prompt": "\\"\\\\", "max_tokens": 1, "user": "' + b'\\"' * 1000 + b'"}',
    ],
)
def test_what_only_looks_bad_is_served(server, body):
    assert send(server.url, post(COMPLETIONS, body)).status == 200


# --- content types and sizes ---


@pytest.mark.parametrize(
    "content_type",
    [
        "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
        "application/octet-stream", "application/jsonp", "text/json", "application",
        "application/json; charset=utf-16", "application/json; charset=latin-1", "*/*", "json",
        "application/xml", "application/x-ndjson", ";", "application/json, text/plain",
    ],
)  # fmt: skip
def test_what_is_not_json_by_name_is_415(refused, content_type):
    body = json.dumps(BASE[COMPLETIONS]).encode()
    data = request("POST", COMPLETIONS, body, AUTHORIZED | {"Content-Type": content_type})
    refused(data, 415, "unsupported_media_type")


@pytest.mark.parametrize(
    "content_type",
    ["application/json; charset=utf-8", "APPLICATION/JSON", 'application/json;charset="UTF-8"'],
)
def test_json_by_other_spellings_is_served(server, content_type):
    body = json.dumps(BASE[COMPLETIONS]).encode()
    data = request("POST", COMPLETIONS, body, AUTHORIZED | {"Content-Type": content_type})
    assert send(server.url, data).status == 200


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "gzip, identity", "x"])
def test_compressed_bodies_are_415(refused, coding):
    data = request("POST", COMPLETIONS, b"\x1f\x8b", AUTHORIZED | {"Content-Encoding": coding})
    refused(data, 415, "unsupported_media_type")


LIMIT = 1 << 20
CHUNKED = AUTHORIZED | {"Transfer-Encoding": "chunked"}


def chunked(*pieces, headers=CHUNKED):
    fields = {"Host": "localhost", "Content-Type": "application/json"} | headers
    head = "".join(f"{name}: {text}\r\n" for name, text in fields.items())
    body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return f"POST {COMPLETIONS} HTTP/1.1\r\n{head}\r\n".encode() + body


def test_large_bodies_are_413(refused):
    refused(post(COMPLETIONS, b" " * (LIMIT + 1)), 413, "request_too_large")
    declared = {"Content-Length": str(LIMIT + 1)}
    refused(request("POST", COMPLETIONS, b"{", AUTHORIZED | declared), 413, "request_too_large")
    huge = {"Content-Length": "9" * 19}
    refused(request("POST", COMPLETIONS, b"{", AUTHORIZED | huge), 413, "request_too_large")
    pieces = [b" " * 65536] * 17
    refused(chunked(*pieces), 413, "request_too_large")  # it never ends
    refused(chunked(*pieces, b""), 413, "request_too_large")
    refused(request("GET", "/health", b" " * (LIMIT + 1)), 413, "request_too_large")


def test_the_largest_body_is_read(server):
    body = json.dumps(BASE[COMPLETIONS] | {"user": ""}).encode()
    body = body[:-2] + b"x" * (LIMIT - len(body)) + body[-2:]
    assert len(body) == LIMIT
    assert send(server.url, post(COMPLETIONS, body)).status == 200


def test_a_declared_length_that_is_too_short_leaves_no_request_behind(server):
    """What follows the declared bytes is the next request, and that one is no HTTP."""
    body = json.dumps(BASE[COMPLETIONS]).encode()
    data = request("POST", COMPLETIONS, body, AUTHORIZED | {"Content-Length": "5"})
    with connect(server.url) as raw:
        raw.sendall(data)
        first = receive(raw)
        assert (first.status, first.error["code"]) == (400, "invalid_value")
    check_served(server)


def test_a_declared_length_that_is_too_long_is_a_client_that_left(server):
    body = json.dumps(BASE[COMPLETIONS]).encode()
    data = request("POST", COMPLETIONS, body, AUTHORIZED | {"Content-Length": "5000"})
    with connect(server.url) as raw:
        raw.sendall(data)
    check_served(server)


# --- heads ---


def test_large_heads_are_431(refused):
    many = AUTHORIZED | {f"X-{number}": "x" for number in range(101)}
    refused(request("GET", "/v1/models", headers=many), 431, "headers_too_large", method="GET")
    one = AUTHORIZED | {"X-Long": "x" * (64 << 10)}
    refused(request("GET", "/v1/models", headers=one), 431, "headers_too_large", method="GET")
    refused(request("POST", COMPLETIONS, b"{}", one), 431, "headers_too_large")
    path = "/" + "x" * (64 << 10)
    refused(request("GET", path, headers=AUTHORIZED), 431, "headers_too_large", method="GET")
    endless = b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * (1 << 20)
    refused(endless, 431, "headers_too_large", method="GET")


HOST = b"Host: localhost\r\n"
POST = b"POST / HTTP/1.1\r\n" + HOST
NO_HTTP = {
    "words": b"hello world, how are you\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "version": b"GET / HTTP/9.9\r\n" + HOST + b"\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /health HTTP/1.1\r\n" + HOST + HOST + b"\r\n",
    "space in a name": b"GET /health HTTP/1.1\r\n" + HOST + b"A B: x\r\n\r\n",
    "no colon": b"GET /health HTTP/1.1\r\n" + HOST + b"Header\r\n\r\n",
    "nul in a value": b"GET /health HTTP/1.1\r\n" + HOST + b"A: x\x00y\r\n\r\n",
    "escape in a value": b"GET /health HTTP/1.1\r\n" + HOST + b"A: \x1b[31m\r\n\r\n",
    "bytes in the path": b"GET /\xff\xfe HTTP/1.1\r\n" + HOST + b"\r\n",
    "two lengths": POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nx",
    "negative length": POST + b"Content-Length: -1\r\n\r\n",
    "length in words": POST + b"Content-Length: many\r\n\r\n",
    "very long length": POST + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n",
    "unknown method": b"FOO /health HTTP/1.1\r\n" + HOST + b"\r\n",
    "method in lower case": b"get /health HTTP/1.1\r\n" + HOST + b"\r\n",
    "no path": b"GET %09/health HTTP/1.1\r\n" + HOST + b"\r\n",
    "other coding": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
    "bad chunk": chunked(headers=CHUNKED) + b"xyz\r\nhello\r\n",
    "negative chunk": chunked(headers=CHUNKED) + b"-5\r\nhello\r\n",
    "proxy protocol": b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\nGET / HTTP/1.1\r\n\r\n",
    "http/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}  # fmt: skip


@pytest.mark.parametrize("name", NO_HTTP)
def test_what_is_no_http_is_400_all_the_same(refused, name):
    refused(NO_HTTP[name], 400, "invalid_value", method="GET")


def test_a_body_has_one_length(refused):
    """Two that differ are how requests are smuggled past a proxy."""
    data = chunked(b"{}", b"", headers=CHUNKED | {"Content-Length": "2"})
    refused(data, 400, "invalid_value")


# --- nobody gets past the keys ---

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "PURGE")
PUBLIC = {"/health", "/ready", "/metrics", "/metrics/vllm", "/ping"}


def routes():
    config = ServeConfig(engine=EngineConfig(model_name="fake", model_folder=None))
    parts = {"metrics": Metrics("fake"), "admission": None, "driver": None}
    app = create_app(SimpleNamespace(config=config, **parts), PortRules())
    return app.routes


TEMPLATES = "|".join(sorted({re.escape(route.path) for route in routes()} | {"none"}))
# Bounded in number: by the routes, and by how many unknown fields are told apart.
BOUNDED = re.compile(
    rf'hocket_http_requests_total{{model="fake",route="({TEMPLATES})",status="'
    "|hocket_unknown_fields_total{"
)
PATHS = sorted({route.path.replace("{model:path}", "fake") for route in routes()})
UNKNOWN = [
    "/", "/nothing", "/v1", "/v1/", "/redoc", "/debug/state", "/admin/drain",
    "/.env", "/favicon.ico",
]  # fmt: skip

FORMS = {
    "plain": "{0}",
    "double slash": "/{0}",
    "trailing slash": "{0}/",
    "dot": "/.{0}",
    "encoded dot": "/%2e{0}",
    "dots": "/health/..{0}",
    "encoded dots": "/health/%2e%2e{0}",
    "encoded slash": "/health%2f..{0}",
    "encoded letters": "/%76%31/../{0}",
    "nul": "{0}%00",
    "newline at the end": "{0}%0a",
    "return at the end": "{0}%0d",
    "delete": "{0}%7f",
    "tab": "/%09{0}",
    "semicolon": "{0};/health",
    "fragment": "{0}%23/health",
    "query": "{0}?x=/health",
    "absolute elsewhere": "http://127.0.0.1/health/..{0}",
    "newline": "{0}%0d%0aX-Y:%20z",
    "upper case": "{1}",
}


@pytest.mark.parametrize("form", FORMS)
def test_without_a_key_every_route_is_closed_in_every_form(server, refused, form):
    for path, method in itertools.product([*PATHS, *UNKNOWN], METHODS):
        target = FORMS[form].format(path, path.upper())
        data = request(method, target)
        path = target.partition("?")[0]
        if (method in ("GET", "HEAD") and path in PUBLIC) or (method, path) == ("POST", "/ping"):
            assert send(server.url, data, method=method).status == 200
            continue
        answer = refused(data, 401, "invalid_api_key", method=method)
        assert answer.headers["www-authenticate"] == "Bearer"


BAD_KEYS = [
    "Bearer", "Bearer ", "Bearer x", f"Basic {KEY}", KEY, f"Bearer {KEY}x", f"Bearer {KEY[:-1]}",
    f"Bearer {KEY.upper()}", f"Bearer  {KEY},", f"Bearer {KEY} {KEY}", f"Bearer\t{KEY}",
    f"Bearer someone:{KEY}", f"Token {KEY}", "Bearer null", "Bearer none", "Bearer *", "Bearer %",
    f"Bearer \xa0{KEY}", "Bearer " + "x" * 10_000, f'Bearer "{KEY}"',
]  # fmt: skip


@pytest.mark.parametrize("value", BAD_KEYS, ids=range(len(BAD_KEYS)))
def test_a_key_that_is_none_opens_nothing(refused, value):
    for path in PATHS:
        if path not in PUBLIC:
            data = request("GET", path, headers={"Authorization": value})
            answer = refused(data, 401, "invalid_api_key", method="GET")
            assert KEY not in answer.body.decode()


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Api-Key": KEY},
        {"Api-Key": KEY},
        {"Cookie": f"Authorization=Bearer {KEY}"},
        {"Proxy-Authorization": f"Bearer {KEY}"},
        {"X-Forwarded-For": "127.0.0.1"},
        {"X-Original-Url": "/health"},
        {"X-Http-Method-Override": "GET"},
        {"Host": "localhost/health"},
        {"Host": "localhost/health?"},
        {"Host": "@"},
        {"Upgrade": "websocket", "Connection": "upgrade"},
        {"Upgrade": "h2c", "Connection": "Upgrade, HTTP2-Settings"},
        {"Authorization": "Bearer x\r\nAuthorization: Bearer " + KEY},
        {"Authorization": "Bearer " + KEY + "\r\nAuthorization: Bearer " + KEY},
    ],
)
def test_other_headers_are_no_key(refused, headers):
    for path in ("/v1/models", COMPLETIONS, f"/v1/models?api_key={KEY}"):
        refused(request("GET", path, headers=headers), 401, "invalid_api_key", method="GET")


def test_a_refused_body_is_neither_read_nor_waited_for(refused):
    for body in (b"{}", b"x" * (2 * LIMIT)):
        refused(request("POST", COMPLETIONS, body), 401, "invalid_api_key")
    asks_first = {"Content-Length": "5000", "Expect": "100-continue"}
    refused(request("POST", COMPLETIONS, b"", asks_first), 401, "invalid_api_key")


# --- with a key: what is not there ---


@pytest.mark.parametrize("path", UNKNOWN)
def test_unknown_paths_are_404(refused, path):
    code = "not_found"
    for method in METHODS:
        refused(request(method, path, headers=AUTHORIZED), 404, code, method=method)


def test_a_target_with_the_server_before_it_is_the_path_behind(server, refused):
    """RFC 9112, 3.2.2; nobody gets past the keys by it."""
    target = "http://127.0.0.1/v1/models"
    assert send(server.url, request("GET", target, headers=AUTHORIZED)).status == 200
    refused(request("GET", target), 401, "invalid_api_key", method="GET")


@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("plain", "query")])
def test_other_spellings_are_no_route(refused, form):
    for path in PATHS:
        target = FORMS[form].format(path, path.upper())
        scope = {"type": "http", "method": "GET", "path": target, "root_path": "", "headers": []}
        if any(route.matches(scope)[0] is not Match.NONE for route in routes()):
            continue  # /v1/models/{model} takes any rest: an unknown model
        data = request("GET", target, headers=AUTHORIZED)
        refused(data, 404, "not_found", method="GET")


def test_other_methods_are_405(refused):
    for path in PATHS:
        for method in ("PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PURGE"):
            data = request(method, path, headers=AUTHORIZED)
            answer = refused(data, 405, "method_not_allowed", method=method)
            assert answer.headers["allow"]


def test_a_model_that_is_not_there_is_404_in_a_path(refused):
    for name in ("other", "%ff", "fake/", "../fake", "x" * 60_000, "%5b31m"):
        data = request("GET", f"/v1/models/{name}", headers=AUTHORIZED)
        refused(data, 404, "model_not_found", param="model", method="GET")


@pytest.mark.parametrize("control", ["%00", "%09", "%0a", "%0d", "%1b", "%7f"])
def test_a_control_character_in_a_path_is_no_route(server, refused, control):
    """Not even where a pattern overlooks it: `$` matches before a newline at the end."""
    for path in (COMPLETIONS, CHAT):
        data = request("POST", path + control, json.dumps(BASE[path]).encode(), AUTHORIZED)
        refused(data, 404, "not_found")
    for path in PATHS:
        data = request("GET", path + control, headers=AUTHORIZED)
        refused(data, 404, "not_found", method="GET")
    answer = send(server.url, request("GET", "/health" + control), method="GET")
    assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")


def test_thousands_of_odd_requests_make_no_metric(server):
    """With `metrics_do_not_grow`: methods and paths are nobody's labels."""
    with connect(server.url) as raw:
        for number, method in zip(range(1_000), itertools.cycle(("PURGE", "LOCK", "SEARCH"))):
            raw.sendall(request(method, f"/p{number}", headers=AUTHORIZED))
            assert receive(raw).status == 404
            raw.sendall(request(method, f"/v1/models/{number}", headers=AUTHORIZED))
            assert receive(raw).status == 405
            raw.sendall(request(method, f"/p{number}"))
            assert receive(raw).status == 401


def test_equal_request_ids_do_not_meet(server):
    """The client's id is only echoed; the request's own is made here."""
    body = json.dumps(BASE[COMPLETIONS]).encode()
    data = request("POST", COMPLETIONS, body, AUTHORIZED | {"X-Request-Id": "same"})
    with connect(server.url) as one, connect(server.url) as other:
        one.sendall(data)
        other.sendall(data)
        answers = [receive(one), receive(other)]
    assert [answer.headers["x-request-id"] for answer in answers] == ["same", "same"]
    assert [answer.status for answer in answers] == [200, 200]
    assert all(json.loads(answer.body)["choices"][0]["finish_reason"] for answer in answers)
