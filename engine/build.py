"""Puts one instance together: weights, KV memory, executor, scheduler, loop.

Torch and everything that needs it are imported here and only when a real model is built, so that
the fake instance starts without them.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from engine import machine
from engine.batch import PersistentBatch
from engine.config import BLOCK_SIZE, EngineConfig
from engine.core import EngineCore, StepScheduler
from engine.decision_log import RecordingScheduler, new_log
from engine.executor import Executor
from engine.fake import ChecksumExecutor
from engine.messages import Ready, Report
from engine.models.errors import NotReproducible
from engine.profile import What
from engine.startup import CannotStart, StartupTimes
from engine.work import Shares
from scheduler.config import InstanceConfig
from scheduler.costs import StepCosts
from scheduler.instance.plan import Chunk, Join, StepPlan
from scheduler.instance.scheduler import InstanceScheduler
from scheduler.kv.blocks import BlockGroup
from scheduler.types import KVGeometry, RequestId, SamplingParams

if TYPE_CHECKING:
    from engine.backend import Backend
    from engine.models.slices import DenseSlices, ModelShape

_FAKE_MAX_MODEL_LEN = 8192
_FAKE_BLOCK_BYTES = 8 * BLOCK_SIZE
_FAKE_KV_BYTES = 16_384 * _FAKE_BLOCK_BYTES
_REVISION_SAMPLE_BYTES = 1 << 20
_MEASURING_S = 0.35  # of a start, for the times of steps; a large model's two shortest take longer
_MEASURED_TOKENS = 288
# Round numbers of no particular machine, between a small model on a CPU and a large one on a GPU;
# `hocket profile` writes those of the machine that it runs on.
FAKE_COST = StepCosts.linear(
    fixed_s=0.010, token_s=0.0005, request_s=0.001, context_token_s=0.0000005
)


def build_engine(
    config: EngineConfig, times: StartupTimes, emit: Callable[[Report], None]
) -> tuple[EngineCore, Ready]:
    """Return the loop, not yet running, and what it can serve.

    Raises ModelFormatError for a model that cannot be read, CannotStart for a machine that cannot
    run it.
    """
    costs: StepCosts | None
    try:
        if config.model_folder is None:
            executor, ready, costs = _build_fake(config)
        else:
            executor, ready, costs = _build_real(config, times)
    except NotReproducible as error:
        raise CannotStart(error.cause, error.remedy) from error
    except (MemoryError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENOMEM:
            raise
        raise CannotStart(
            f"there is not enough memory for these limits: {error}",
            "lower --kv-memory, --max-num-running or --max-model-len",
        ) from error
    scheduler = _scheduler(config, ready, costs)
    ready = msgspec.structs.replace(
        ready,
        max_num_running=config.max_num_running,
        # A step in flight, and one to be planned, never lack work.
        max_num_waiting_tokens=(config.depth + 1) * config.max_num_batched_tokens,
    )
    return EngineCore(scheduler, executor, emit, depth=config.depth), ready


def _scheduler(config: EngineConfig, ready: Ready, costs: StepCosts | None) -> StepScheduler:
    settings = InstanceConfig(
        max_model_len=ready.max_model_len,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_step_s=config.max_step_s,
        max_num_running=config.max_num_running,
        max_num_waiting=config.max_num_waiting,
        policy=config.policy,
        prefix_caching=config.prefix_caching,
        model_revision=_model_revision(config, ready),
    )
    if config.decision_log is None:
        return InstanceScheduler(settings, ready.geometry, costs)
    try:
        return RecordingScheduler(settings, ready.geometry, new_log(config.decision_log), costs)
    except OSError as error:
        raise CannotStart(
            f"the decision log {config.decision_log} cannot be written: {error.strerror}",
            "name another file with --decision-log",
        ) from error


def _model_revision(config: EngineConfig, ready: Ready) -> str:
    """Return what tells this model's keys and values from those of others.

    Reading all weights would double the time to start: the config, and of each weight file its
    size, head and tail stand for them. Two models that differ in nothing of these are the same.
    """
    digest = hashlib.sha256(f"{ready.dtype} {ready.kernels} {config.batch_invariant}".encode())
    if config.model_folder is not None:
        digest.update((config.model_folder / "config.json").read_bytes())
        for path in sorted(config.model_folder.glob("*.safetensors")):
            with path.open("rb") as file:
                head = file.read(_REVISION_SAMPLE_BYTES)
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - _REVISION_SAMPLE_BYTES))
                digest.update(f"{path.name} {size}".encode() + head + file.read())
    return digest.hexdigest()


def _build_fake(config: EngineConfig) -> tuple[Executor, Ready, StepCosts]:
    num_bytes = config.kv_memory_bytes or _FAKE_KV_BYTES
    costs = FAKE_COST if config.profile is None else config.profile.costs
    if config.fake_step_s is not None:
        costs = StepCosts.linear(fixed_s=config.fake_step_s)
    geometry = KVGeometry(
        block_size=BLOCK_SIZE,
        num_blocks=num_bytes // _FAKE_BLOCK_BYTES,
        block_bytes=_FAKE_BLOCK_BYTES,
    )
    _check_geometry(geometry, num_bytes)
    max_model_len = min(config.max_model_len or _FAKE_MAX_MODEL_LEN, geometry.num_tokens)
    executor = ChecksumExecutor(
        geometry,
        max_num_rows=config.max_num_running,
        max_model_len=max_model_len,
        vocab_size=config.fake_vocab_size,
        cost=costs,
    )
    ready = Ready(config.model_name, "checksum", "none", max_model_len, geometry)
    return executor, ready, costs


def _build_real(
    config: EngineConfig, times: StartupTimes
) -> tuple[Executor, Ready, StepCosts | None]:
    # Threads that wait for others spin a little, then sleep. By default libgomp spins for so long
    # that two processes on the same cores take four times their share of the time; without any
    # spinning a decode step alone takes up to twice as long. libgomp reads this when it is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    with times.phase("import", "importing torch"):
        import torch

        from engine.backend import backend_of, load_best
        from engine.kv.cache import kv_geometry
    torch.set_num_threads(config.num_threads or machine.num_usable_cores())
    if not re.fullmatch(r"cpu|cuda(:\d+)?", config.device, re.ASCII):
        raise CannotStart(f"--device {config.device} is not supported", "name cpu, cuda or cuda:0")
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise CannotStart(
            f"--device {config.device}: this torch finds no CUDA device",
            "install the CUDA build of torch and a driver, or leave --device out",
        )
    assert config.model_folder is not None
    _check_memory(config)
    with times.phase("weights", "reading weights"):
        model, kernels = load_best(
            config.model_folder,
            config.dtype,
            config.device,
            lambda done, _: times.advance(done),
            batch_invariant=config.batch_invariant,
        )
    shape = model.shape
    with times.phase("kv", "making KV memory"):
        if config.kv_memory_bytes is not None:
            num_bytes = config.kv_memory_bytes
        elif shape.device.type == "cuda":
            num_bytes = int(torch.cuda.mem_get_info(shape.device)[0] * machine.KV_SHARE_CUDA)
        else:
            num_bytes = machine.default_kv_bytes()
        geometry = kv_geometry(shape, BLOCK_SIZE, num_bytes)
        _check_geometry(geometry, num_bytes)
    # A window that the KV memory cannot hold would only promise what is then refused.
    max_model_len = min(
        config.max_model_len or shape.max_model_len, shape.max_model_len, geometry.num_tokens
    )
    with times.phase("kernels", "proving kernels"):
        backend = backend_of(model, geometry, batch_invariant=config.batch_invariant)
    batch = PersistentBatch(config.max_num_running, max_model_len, BLOCK_SIZE)
    with times.phase("warm_up", "warming up"):
        scratch = PersistentBatch(1, BLOCK_SIZE, BLOCK_SIZE)
        _warm_up(_executor(model, backend, scratch), backend.cache.scratch_block)
    dtype = str(shape.dtype).removeprefix("torch.")
    what = What(
        model=config.model_folder.name,
        dtype=dtype,
        kernels=kernels,
        num_threads=torch.get_num_threads(),
    )
    with times.phase("step_times", "measuring steps"):
        num_row_tokens = min(max_model_len, _MEASURED_TOKENS)
        scratch = PersistentBatch(1, num_row_tokens, BLOCK_SIZE)
        stand_in = _executor(model, backend, scratch)
        costs = _step_costs(config, what, stand_in, shape, min(num_row_tokens, geometry.num_tokens))
    executor = _executor(model, backend, batch)
    ready = Ready(
        config.model_name, dtype, str(shape.device), max_model_len, geometry, kernels=kernels
    )
    return executor, ready, costs


def _step_costs(
    config: EngineConfig, what: What, executor: Executor, shape: ModelShape, num_tokens: int
) -> StepCosts | None:
    """Return what steps cost: as a profile says, or measured on a row of so many tokens.

    None if nobody needs to know, or there is no room to measure.
    """
    from engine.models.registry import read_config
    from engine.step_times import Stand, estimate, measure_within

    if config.profile is not None:
        difference = config.profile.what.difference(what)
        if difference is not None:
            raise CannotStart(
                f"the steps of --step-costs were measured with {difference}",
                "measure again with `hocket profile`, or leave --step-costs out",
            )
        return config.profile.costs
    if config.max_step_s is None:
        return None
    assert config.model_folder is not None
    num_blocks = num_tokens // BLOCK_SIZE
    stand = Stand(executor, num_rows=1, num_row_tokens=num_tokens, num_blocks=num_blocks)
    cells = measure_within(stand, _MEASURING_S)
    if len(cells) < 2:
        return None
    return estimate(cells, Shares.of(read_config(config.model_folder), shape))


def _executor(model: DenseSlices, backend: Backend, batch: PersistentBatch) -> Executor:
    from engine.executors.sequential import SequentialExecutor

    return SequentialExecutor(
        model,
        backend.attention,
        backend.cache,
        batch,
        rows=backend.rows,
        forward=backend.forward,
    )


def _check_memory(config: EngineConfig) -> None:
    """Refuse a model that would be killed while it loads: nobody explains that to its user."""
    assert config.model_folder is not None
    limit = machine.memory_limit_bytes()
    needed = sum(file.stat().st_size for file in config.model_folder.glob("*.safetensors"))
    if config.device == "cpu" and needed > limit:
        raise CannotStart(
            f"the weights take {needed / machine.GIB:.1f} GiB, and this process may use "
            f"{limit / machine.GIB:.1f} GiB",
            "use a smaller model, or a machine with more memory",
        )


def _check_geometry(geometry: KVGeometry, num_bytes: int) -> None:
    if geometry.num_blocks < 1:
        raise CannotStart(
            f"KV memory of {num_bytes} bytes holds no block of {geometry.block_bytes} bytes",
            "give it more with --kv-memory",
        )


def _warm_up(executor: Executor, block: int) -> None:
    """Run a chunk and a single token in a block of nobody; no request pays for first calls."""
    request_id, token_ids = RequestId("warm-up"), (0,) * (BLOCK_SIZE - 2)
    params = SamplingParams(max_tokens=2, temperature=1.0, top_p=0.9)
    join = Join(request_id, token_ids, len(token_ids), 0, (BlockGroup(block, 1),), params)
    for plan in (
        StepPlan(step_id=0, joins=(join,), chunks=(Chunk(request_id, len(token_ids)),)),
        StepPlan(step_id=1),
    ):
        executor.submit(plan)
        executor.poll()
