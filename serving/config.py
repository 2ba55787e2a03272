"""Settings of a server: the flags as typed, and what they mean, frozen before anything starts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from engine.config import EngineConfig
from serving.admission import AdmissionLimits
from serving.cluster.placement import Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeFlags:
    """The flags of `hocket serve`.

    Attributes
    ----------
    host
        Address to listen on.
    port
        Port to listen on; 0 takes a free one.
    dtype
        Computation and KV memory; auto takes the model's own where the device is good at it.
    device
        cpu, cuda, or a CUDA device such as cuda:0.
    served_model_name
        The name that clients use; by default the model's.
    max_model_len
        Longest prompt and answer together, in tokens; by default the model's window.
    max_num_running
        Requests that compute at a time.
    max_num_waiting
        Requests that may queue; beyond it the server answers 503.
    max_num_waiting_tokens
        Prompt tokens that may queue, together; beyond it the server answers 503.
    max_num_streams
        HTTP requests open at a time; by default twice what may run and queue.
    max_queue_age
        Seconds after which a request that has not begun ends with 503; 0 lets it wait for ever.
    tenant_share
        How much of the queue and of the streams one tenant may take; beyond it the answer is 429.
        By default all, or a half where the keys are of several tenants.
    max_num_batched_tokens
        Tokens of one step, when no answer is being written; else see --max-step-ms.
    max_step_ms
        Milliseconds that a step takes at most while answers are being written: so long a new prompt
        may hold up their next tokens. Of prompts each step computes what fits, and 16 tokens
        at least; decoding alone may take longer. 0 sets no limit.
    step_costs
        What steps cost, as `hocket profile` wrote it; by default measured in a moment at start.
    scheduling_policy
        Who computes first: fcfs is first come, first served; priority goes by each request's
        `priority`, smaller first.
    prefix_caching
        Keep what prompts have in common, and compute it once.
    batch_invariant
        Compute each request the same to the last bit, whoever is beside it; slower.
    depth
        Steps in flight: at 2 a step is planned while the one before it computes.
    kv_memory
        Memory for keys and values, such as 4GiB. By default a quarter of the memory this process
        may use, at most 4 GiB; on a GPU 90 % of what is free.
    threads
        Threads to compute with; by default one for each core this process may use.
    drain_timeout
        Seconds that running requests get to end after SIGTERM or Ctrl-C.
    sse_keep_alive
        Seconds of silence after which a stream gets a comment, so that proxies keep it open.
    slow_client_timeout
        Seconds after which a client that reads nothing of its stream loses it.
    watchdog_timeout
        Seconds that an instance with requests may take for a step; then it is ended and started
        again. Its requests go on elsewhere, or on the new one.
    fake
        Serve the checksum executor instead of a model: no torch, step times from a cost table.
    fake_step
        Seconds that each step takes with --fake, whatever is in it, instead of the cost table.
    instances
        Copies of the model, each in a process of its own that Ray starts and watches. One alone
        needs no Ray. On one machine they share its cores and the memory for keys and values.
    cluster
        YAML file of instances that differ, and of what each asks of its node: docs/cluster.md.
    ray_address
        A Ray cluster to run the instances in; by default a session of this server's own.
    dispatch
        Which instance gets a request: freeness goes by load and free KV memory, least_loaded by
        load, power_of_two by the load of two drawn ones, round_robin by turns.
    priority_headroom
        Tokens of KV memory that --dispatch freeness keeps for the growth of requests of high
        priority, which is a number below 0, on each instance that has some.
    prefix_affinity
        Prefer an instance that has computed the beginning of a prompt already.
    continuation_timeout
        Seconds that a request waits for an instance to go on, when the one that ran it was lost.
    decision_log
        File for every decision of the scheduler; `hocket replay FILE` makes them again. It holds
        the prompts as token ids, and only its owner may read it.
    log_json
        Log JSON, an object a line, instead of words.
    log_level
        debug adds a line for each request, and the messages of exceptions, which may quote one.
    api_keys
        File of API keys, one `tenant: key` a line, that other users may not read. It is read again
        when it changes. HOCKET_API_KEYS does the same, with commas between the entries.
    admin_port
        Port on 127.0.0.1 for operators, and for `hocket status`, `scale`, `restart` and `drain`. 0
        takes a free one; by default there is none.
    admin_keys
        File of operators' keys, like --api-keys, or HOCKET_ADMIN_KEYS; needed if the API has keys.
    allowed_hosts
        Host names that clients may call this server by, beside loopback's.
    insecure
        Serve an address other than loopback without keys: whoever reaches it may use it.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "cpu"
    served_model_name: str | None = None
    max_model_len: int | None = None
    max_num_running: int = 64
    max_num_waiting: int = 512
    max_num_waiting_tokens: int = 262_144
    max_num_streams: int | None = None
    max_queue_age: float = 60.0
    tenant_share: float | None = None
    max_num_batched_tokens: int = 512
    max_step_ms: float = 150.0
    step_costs: Path | None = None
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    prefix_caching: bool = True
    batch_invariant: bool = False
    depth: Literal[1, 2] = 1
    kv_memory: str | None = None
    threads: int | None = None
    drain_timeout: float = 30.0
    sse_keep_alive: float = 15.0
    slow_client_timeout: float = 30.0
    watchdog_timeout: float = 30.0
    fake: bool = False
    fake_step: float | None = None
    instances: int = 1
    cluster: Path | None = None
    ray_address: str | None = None
    dispatch: str = "freeness"
    priority_headroom: int = 0
    prefix_affinity: bool = True
    continuation_timeout: float = 30.0
    decision_log: Path | None = None
    log_json: bool = False
    log_level: Literal["debug", "info", "warning"] = "info"
    api_keys: Path | None = None
    admin_port: int | None = None
    admin_keys: Path | None = None
    allowed_hosts: tuple[str, ...] = ()
    insecure: bool = False

    @property
    def uses_ray(self) -> bool:
        """Whether instances are Ray actors; one that nobody said more of is a child process."""
        return self.instances > 1 or self.cluster is not None or self.ray_address is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceSpec:
    """What one instance is, and what it asks of its node."""

    engine: EngineConfig
    placement: Placement = field(default_factory=Placement)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Safe by default: loopback only, small bodies, a bounded queue."""

    engine: EngineConfig  # of the first instance
    instances: tuple[InstanceSpec, ...] = ()  # at the start; none: one of `engine`
    ray_address: str | None = None
    dispatch: str = "freeness"
    priority_headroom_tokens: int = 0
    prefix_affinity: bool = True
    continuation_timeout_s: float = 30.0
    host: str = "127.0.0.1"
    port: int = 8000
    drain_timeout_s: float = 30.0
    watchdog_timeout_s: float = 30.0
    sse_keep_alive_s: float = 15.0
    slow_client_timeout_s: float = 30.0
    admission: AdmissionLimits = field(default_factory=AdmissionLimits)  # as it starts
    max_num_streams: int | None = None  # None: by what may run and queue
    max_body_bytes: int = 1 << 20
    max_total_body_bytes: int = 128 << 20  # of those that are not complete
    max_num_choices: int = 8  # n
    max_num_prompts: int = 64  # prompts in one completion request
    body_timeout_s: float = 60.0  # 1 MiB in that time is 17 KiB/s
    admin_port: int | None = None
    num_keys: int = 0  # a fact for the ready block; the keys themselves are in no setting

    @property
    def watch_interval_s(self) -> float:
        """Seconds between looks at what is open: a third of the shortest patience, at most 1."""
        limits = (
            self.sse_keep_alive_s,
            self.slow_client_timeout_s,
            self.admission.max_queue_age_s,
        )
        return max(0.02, min(1.0, *(seconds / 3 for seconds in limits)))

    @property
    def num_instances(self) -> int:
        """How many there are at the start."""
        return max(1, len(self.instances))

    def instance(self, number: int) -> InstanceSpec:
        """Return what the instance of this number is: beyond those at the start, as the last."""
        if not self.instances:
            return InstanceSpec(engine=self.engine)
        return self.instances[min(number, len(self.instances) - 1)]

    def admission_of(self, numbers: Iterable[int]) -> AdmissionLimits:
        """Return the bounds of a server with these instances."""
        max_num_running = sum(self.instance(n).engine.max_num_running for n in numbers)
        max_num_requests = max_num_running + self.admission.max_num_waiting
        return replace(
            self.admission,
            max_num_running=max_num_running,
            max_num_streams=self.max_num_streams or 2 * max_num_requests,
        )


def parse_bytes(text: str) -> int:
    """Return the bytes that `4GiB`, `500MB` or `123` say. Raises ValueError for anything else."""
    units = {"": 1, "B": 1}
    for power, letter in enumerate("KMGT", start=1):
        units[f"{letter}IB"] = units[letter] = 1024**power
        units[f"{letter}B"] = 1000**power
    number = text.strip().upper()
    digits = number.rstrip("BIKMGT ")
    unit = number[len(digits) :].strip()
    if unit not in units or not digits.replace(".", "", 1).isdecimal():
        raise ValueError(f"{text!r} is not a size such as 4GiB or 500MB")
    return int(float(digits) * units[unit])
