"""A server in this process whose instance says what a test tells it to: no executor, no socket."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass

from engine.config import EngineConfig
from engine.messages import Abort, Failed, Inspect, Inspected, Ready, StepEvents, Submit
from scheduler.cluster.scheduler import ClusterScheduler
from scheduler.load import InstanceView
from scheduler.types import (
    FinishedEvent,
    FinishReason,
    InstanceId,
    Logprobs,
    PromptLogprobs,
    StartedEvent,
    TokenEvent,
)
from serving.api.admin import create_admin_app
from serving.api.app import create_app
from serving.api.service import Service
from serving.cluster.driver import ClusterDriver
from serving.cluster.fleet import Fleet
from serving.cluster.hosts import wire
from serving.cluster.members import Members
from serving.config import ServeConfig
from serving.metrics import Metrics
from serving.ports import PortRules
from serving.text.chat import chat_template
from serving.text.tokenizer import fake_codec
from tests.factories import make_geometry

CODEC = fake_codec()
TEMPLATE = chat_template(CODEC)  # its processes serve all tests
JSON = {"content-type": "application/json"}
MAX_MODEL_LEN = 64
VIEW = InstanceView(
    num_running=0,
    num_waiting=0,
    num_waiting_tokens=0,
    num_blocks=1,
    num_free_blocks=1,
    num_steps=0,
    num_computed_tokens=0,
    num_preemptions=0,
)


def encode(text):
    return CODEC.encode(text, add_special_tokens=False)


def score(token_id, num_top):
    """Scores in which a token of an even id is the likeliest and one of an odd id is not."""
    chosen = -0.1 - token_id / 7
    others = [(2, -0.05)] if token_id % 2 else []
    likely = [*others, (token_id, chosen), (3, -40.5), (5, -41.5)]
    return Logprobs(chosen, tuple(likely[:num_top]))


@dataclass
class Script:
    """What the instance does with a request: these tokens, at most as many as were asked for."""

    token_ids: list[int]
    num_cached_tokens: int = 0
    error: str | None = None  # after the tokens
    score: object = staticmethod(score)


class ScriptedHandle:
    """An instance that runs scripts, a token a step, with every report through the wire."""

    instance_id = InstanceId("instance-0")

    def __init__(self, script_of):
        self.commands = []
        self.specs = {}
        self.answers_inspections = True
        self.was_inspected = asyncio.Event()
        self.was_submitted = asyncio.Event()
        self._script_of = script_of
        self._tasks = {}

    async def start(self, on_report):
        self._report = lambda report: on_report(wire.decode_report(wire.encode(report)))
        return Ready("m", "float32", "cpu", MAX_MODEL_LEN, make_geometry())

    def send(self, command):
        command = wire.decode_command(wire.encode(command))
        self.commands.append(command)
        match command:
            case Submit(spec):
                self.specs[spec.request_id] = spec
                self.was_submitted.set()
                self._tasks[spec.request_id] = asyncio.ensure_future(self._run(spec))
            case Abort(request_id):
                self._tasks[request_id].cancel()
            case Inspect(number):
                self.was_inspected.set()
                if self.answers_inspections:
                    self._report(Inspected(number, {"num_requests": len(self.specs)}))

    def fail(self):
        self._report(Failed("the device is gone"))

    async def stop(self):
        for task in self._tasks.values():
            task.cancel()

    async def _run(self, spec):
        script, params = self._script_of(spec), spec.params
        name, prompt = spec.request_id, spec.prompt_token_ids
        reason = FinishReason.LENGTH
        try:
            await asyncio.sleep(0)
            self._step(started=[StartedEvent(name, 0.5, script.num_cached_tokens)])
            if params.prompt_logprobs is not None:
                scores = [script.score(token, params.prompt_logprobs) for token in prompt[1:]]
                half = len(scores) // 2
                for start, part in ((1, scores[:half]), (1 + half, scores[half:])):
                    self._step(prompt_logprobs=[PromptLogprobs(name, start, tuple(part))])
            for index, token in enumerate(script.token_ids[: params.max_tokens]):
                await asyncio.sleep(0.001)
                asked = params.logprobs
                scored = None if asked is None else script.score(token, asked)
                self._step(tokens=[TokenEvent(name, index, token, scored)])
                if token in params.stop_token_ids:
                    reason = FinishReason.STOP
                    break
            if script.error is not None:
                reason = FinishReason.ERROR
        except asyncio.CancelledError:
            reason = FinishReason.ABORT
        self._step(finished=[FinishedEvent(name, reason, 0, script.error or "")])

    def _step(self, **events):
        kinds = ("started", "prompt_logprobs", "tokens", "finished", "rejected")
        nothing = {kind: [] for kind in kinds}
        self._report(StepEvents(**nothing | events, view=VIEW, step_s=0.001))


@dataclass(frozen=True)
class Answer:
    status: int
    parts: list[str]  # as they were sent
    headers: dict[str, str]

    @property
    def text(self):
        return "".join(self.parts)

    def json(self):
        return json.loads(self.text)

    def events(self):
        """Return the chunks of a stream, without its end."""
        lines = [line.removeprefix("data: ") for line in self.text.split("\n\n") if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]


class Server:
    """An API over a scripted instance; its calls are those of a client."""

    def __init__(self, script_of, **engine):
        self.handle = ScriptedHandle(script_of)
        self.metrics = Metrics("m")
        self._engine = EngineConfig(model_name="m", model_folder=None, **engine)

    async def __aenter__(self):
        self.driver = ClusterDriver(ClusterScheduler(), CODEC, self.metrics)
        stays_lost = asyncio.Event().wait  # and is not started again
        members = Members(
            self.driver,
            lambda *_: self.handle,
            drain_timeout_s=30,
            sleep=lambda _: stays_lost(),
        )
        self.fleet = Fleet(self.driver, members, 1)
        service = Service(
            config=ServeConfig(engine=self._engine),
            ready=await self.fleet.start(),
            codec=CODEC,
            template=TEMPLATE,
            driver=self.driver,
            metrics=self.metrics,
            started_at=0,
        )
        self._app = create_app(service, PortRules(any_host=True))
        self._admin_app = create_admin_app(service, self.fleet, PortRules(any_host=True))
        return self

    async def __aexit__(self, *_):
        await self.fleet.stop()
        await self.driver.stop()

    @property
    def last_spec(self):
        return list(self.handle.specs.values())[-1]

    async def get(self, path):
        return await self._call("GET", path, b"")

    async def admin(self, method, path, body=None):
        data = body
        if not isinstance(body, bytes):
            data = b"" if body is None else json.dumps(body).encode()
        return await self._call(method, path, data, app=self._admin_app)

    async def complete(self, **body):
        return await self._post("/v1/completions", {"prompt": "Once"} | body)

    async def chat(self, **body):
        messages = [{"role": "user", "content": "hi"}]
        return await self._post(
            "/v1/chat/completions", {"messages": messages, "max_tokens": 4} | body
        )

    async def tokenize(self, prompt):
        return await self._post("/tokenize", {"prompt": prompt})

    async def _post(self, path, body):
        return await self._call("POST", path, json.dumps(body).encode())

    async def _call(self, method, path, body, headers=JSON, app=None):
        """One HTTP exchange as ASGI has it; the client stays until the answer is complete."""
        path, _, query = path.partition("?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "scheme": "http",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            "client": ("test", 1),
            "server": ("test", 80),
        }
        inbox, sent = asyncio.Queue(), []
        inbox.put_nowait({"type": "http.request", "body": body, "more_body": False})

        async def send(message):
            sent.append(message)

        await (app or self._app)(scope, inbox.get, send)
        parts = [message.get("body", b"").decode() for message in sent[1:]]
        received = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return Answer(sent[0]["status"], parts, received)

    def metric(self, name):
        lines = self.metrics.render().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def says(text, **script):
    """Make scripts in which every request is answered with this text."""
    return lambda spec: Script(encode(text), **script)
