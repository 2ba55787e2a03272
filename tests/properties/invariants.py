"""What must hold in the scheduler after every step, whatever happened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from scheduler.instance.plan import StepPlan
from scheduler.instance.scheduler import InstanceScheduler
from scheduler.kv.blocks import BlockGroup


def blocks_of(groups: Iterable[BlockGroup]) -> list[int]:
    return [block for group in groups for block in range(group.start, group.end)]


def touched_blocks(scheduler: InstanceScheduler, plan: StepPlan) -> set[int]:
    """Return the blocks that a step just planned reads or writes."""
    tables = scheduler.kv.tables()
    touched = {copy.source for copy in plan.copies}
    for request in scheduler._queues.running:
        if request.in_batch:
            touched.update(blocks_of(tables[request.request_id]))
    return touched


def check_blocks(scheduler: InstanceScheduler, in_flight: dict[int, set[int]]) -> None:
    """Every block is held as often as it is counted, or in exactly one other place.

    `in_flight` are the steps that have not completed, and the blocks that each touches.
    """
    kv = scheduler.kv
    held = Counter(blocks_of(kv.retired()))
    for groups in kv.tables().values():
        held.update(blocks_of(groups))
    places = Counter(list(held))
    places.update(blocks_of(kv.free_runs()))
    places.update(blocks_of(kv.idle()))
    places.update(blocks_of(kv.to_clear()))
    assert places == Counter(range(kv.geometry.num_blocks)), "a block is lost or in two places"
    assert [held[block] for block in range(kv.geometry.num_blocks)] == kv._refs
    assert set(kv._retired) <= set(in_flight), "blocks are held for steps that have completed"
    for step_id, blocks in in_flight.items():
        assert held.keys() >= blocks, f"a block was let go under step {step_id}"
    num_free = sum(run.num_blocks for run in kv.free_runs()) + len(blocks_of(kv.idle()))
    assert kv.num_free_blocks == num_free
    for block in blocks_of(kv.idle()):
        assert kv._index.holds(block), "a block is kept that nobody can find"
    for block in (*kv._dirty, *kv._to_clear):
        assert not kv._index.holds(block), "what failed can be found"
    claims = set(kv._pool.claims())
    ends = {table.end for table in kv._tables.values()}
    ends |= {entry.table.end for entries in kv._retired.values() for entry in entries}
    assert {claim.start for claim in claims} <= ends, "a claim without a table before it"
    previous = None
    for run in kv.free_runs():
        if previous is not None and previous.end == run.start:
            assert previous in claims or run in claims, "free runs touch"
        previous = run


class Queue:
    """The waiting requests before a step is planned, to see who of them may be admitted."""

    def __init__(self, scheduler: InstanceScheduler) -> None:
        self.scheduler = scheduler
        self.waiting = list(scheduler._queues.waiting)
        self.num_planned_tokens = scheduler.view().num_computed_tokens

    def check_plan(self) -> None:
        """The budget is kept, and nobody was let in before a waiting one of a higher rank."""
        scheduler = self.scheduler
        num_tokens = scheduler.view().num_computed_tokens - self.num_planned_tokens
        assert num_tokens <= scheduler.config.max_num_batched_tokens, "the budget is exceeded"
        admitted = [request for request in self.waiting if request in scheduler._queues.running]
        for request in scheduler._queues.waiting:
            for other in admitted:
                assert other.rank <= request.rank or request.waits_for is not None, "out of order"


def check_requests(scheduler: InstanceScheduler) -> None:
    kv, config = scheduler.kv, scheduler.config
    queues = scheduler._queues
    running, waiting = queues.running, queues.waiting
    assert len(running) <= config.max_num_running
    assert len(running) + len(waiting) <= config.max_num_running + config.max_num_waiting
    assert len(running) + len(waiting) == len(queues.requests)
    view = scheduler.view()
    assert view.num_waiting_tokens == sum(request.num_tokens for request in waiting)
    assert {request.request_id for request in running} == set(kv.tables())
    for request in running:
        blocks = blocks_of(kv.groups(request.request_id))
        assert len(blocks) >= kv.blocks_for(request.num_scheduled)
        assert request.num_preemptions <= config.max_num_preemptions
        # Where its next token goes, only it writes; a lease for a copy reads what lies before.
        for block in blocks[request.num_scheduled // kv.geometry.block_size :]:
            copied = blocks_of(kv.retired()).count(block)
            assert kv._refs[block] - copied == 1, "a block is to be written and is shared"
