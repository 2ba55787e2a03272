"""The instances of a server: starts, scaling, rolling restarts, drains, and what fails in them."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import msgspec
import pytest

from engine.messages import Ready
from serving.cluster.members import common_ready
from serving.errors import Conflict, InvalidRequest, NotFound, UserError
from tests.factories import make_geometry
from tests.serving.scripted_fleet import ScriptedFleet, no_memory


def fleet_test(*args, **settings):
    """Run the test in an event loop, with a fleet that has started."""

    def decorate(scenario):
        async def run():
            async with ScriptedFleet(*args, **settings) as it:
                await scenario(it)

        def test():
            asyncio.run(run())

        test.__name__ = scenario.__name__
        return test

    return decorate


# --- the start ---


def test_all_start_at_the_same_time():
    async def run():
        it = ScriptedFleet(3, holds={0, 1, 2})
        starting = asyncio.ensure_future(it.fleet.start())
        await it.until(lambda: len(it.driver.log) == 3)
        assert it.states() == {f"instance-{n}": "starting" for n in range(3)}
        with pytest.raises(Conflict, match="still starting"):
            it.fleet.scale(4)
        for number in (2, 0, 1):
            it.instances[number].may_start.set()
        await starting
        assert it.driver.log[:3] == [f"start instance-{n} 1" for n in range(3)]
        assert it.numbers == [[0, 1, 2]]
        assert it.states() == {f"instance-{n}": "up" for n in range(3)}
        await it.fleet.stop()

    asyncio.run(run())


def test_the_first_that_cannot_start_ends_the_start_of_all():
    async def run():
        it = ScriptedFleet(3, holds={0, 2}, faults={(1, 1): no_memory()})
        with pytest.raises(UserError, match="instance-1: no memory"):
            await it.fleet.start()
        assert all(instance.is_stopped for instance in it.instances.values())
        assert it.states() == {}

    asyncio.run(run())


def test_a_start_that_is_given_up_leaves_nothing():
    async def run():
        it = ScriptedFleet(2, holds={1})
        starting = asyncio.ensure_future(it.fleet.start())
        await it.until(lambda: it.driver.up)
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        assert starting.cancelled()
        assert it.driver.handles == {}

    asyncio.run(run())


def test_what_holds_for_all_is_promised():
    one = Ready("m", "float32", "cpu", 64, make_geometry(), startup_s={"import": 1, "kv": 2})
    other = msgspec.structs.replace(
        one, dtype="bfloat16", max_model_len=48, startup_s={"import": 3}
    )
    small = msgspec.structs.replace(
        one, geometry=replace(make_geometry(), num_blocks=1), device="cuda:0"
    )
    common = common_ready([one, other, small])
    assert (common.max_model_len, common.dtype) == (48, "bfloat16 and float32")
    assert common.device == "cpu and cuda:0"
    assert common.geometry == small.geometry
    assert common.startup_s == {"import": 3, "kv": 2}
    assert common_ready([one]) == one


# --- how many ---


@fleet_test(1)
async def test_new_ones_serve_as_they_come(it):
    it.holds = {1, 2}
    change = it.fleet.scale(3)
    await it.until(lambda: 2 in it.instances)
    it.instances[2].may_start.set()
    await it.until(lambda: it.states().get("instance-2") == "up")
    assert it.states()["instance-1"] == "starting"
    assert it.fleet.state()["change"]["title"] == "scaling to 3"
    it.instances[1].may_start.set()
    done = await it.until_done()
    assert (done["number"], done["error"]) == (change.number, None)
    assert done["lines"][:2] == ["instance-1 starts", "instance-2 starts"]
    assert done["lines"][2].startswith("instance-2 is up")
    assert it.numbers[-1] == [0, 1, 2]


@fleet_test(4)
async def test_the_highest_numbers_drain_and_leave(it):
    it.driver.holds_drains = True
    it.fleet.scale(2)
    assert it.fleet.state()["num_wanted"] == 2
    await it.until(lambda: it.states()["instance-2"] == "drained")
    assert it.numbers[-1] == [0, 1], "bounds shrink as soon as they get no new work"
    assert not it.instances[3].is_stopped
    it.driver.may_drain.set()
    assert (await it.until_done())["error"] is None
    assert it.states() == {"instance-0": "up", "instance-1": "up"}
    assert it.instances[2].is_stopped
    assert it.instances[3].is_stopped
    assert it.driver.log.index("drain instance-2") < it.driver.log.index("remove instance-2")


@fleet_test(4)
async def test_those_that_do_not_serve_leave_first(it):
    it.fleet.drain("instance-0")
    await it.until_done()
    it.holds = {1}
    it.driver.lose("instance-1")
    await it.until(lambda: it.states()["instance-1"] == "starting")
    it.fleet.scale(3)
    assert (await it.until_done())["error"] is None
    assert set(it.states()) == {"instance-0", "instance-2", "instance-3"}
    it.fleet.scale(2)
    await it.until_done()
    assert it.states() == {"instance-2": "up", "instance-3": "up"}
    it.fleet.scale(1)
    await it.until_done()
    assert it.states() == {"instance-2": "up"}


@fleet_test(3)
async def test_none_leaves_while_none_would_serve(it):
    it.holds = {1, 2}
    it.fleet.drain("instance-0")
    await it.until_done()
    for number in (1, 2):
        it.driver.lose(f"instance-{number}")
    with pytest.raises(Conflict, match="nothing would serve") as refusal:
        it.fleet.scale(1)
    assert refusal.value.code == "nothing_would_serve"
    assert it.fleet.state()["num_wanted"] == 3
    await it.until(lambda: it.states()["instance-1"] == "starting")
    it.instances[1].may_start.set()
    await it.until(lambda: it.states()["instance-1"] == "up")
    it.fleet.scale(1)
    await it.until_done()
    assert it.states() == {"instance-1": "up"}


@fleet_test(1)
async def test_the_last_wish_counts(it):
    it.holds = {1, 2, 3}
    first = it.fleet.scale(4)
    await it.until(lambda: 3 in it.instances)
    assert it.fleet.scale(2) is first
    await it.until(lambda: it.instances[3].is_stopped and it.instances[2].is_stopped)
    assert "drain instance-3" not in it.driver.log, "one that was not up has nothing to drain"
    it.instances[1].may_start.set()
    done = await it.until_done()
    assert done["title"] == "scaling to 2"
    assert it.states() == {"instance-0": "up", "instance-1": "up"}


@fleet_test(3)
async def test_up_again_while_others_still_drain(it):
    it.driver.holds_drains = True
    it.fleet.scale(1)
    await it.until(lambda: it.states()["instance-1"] == "drained")
    it.fleet.scale(2)
    await it.until(lambda: it.states().get("instance-3") == "up")
    it.driver.may_drain.set()
    await it.until_done()
    assert it.states() == {"instance-0": "up", "instance-3": "up"}
    assert it.numbers[-1] == [0, 3]
    it.fleet.scale(3)
    await it.until_done()
    assert set(it.states()) == {"instance-0", "instance-1", "instance-3"}, "free numbers come back"


@fleet_test(1, faults={(1, 1): no_memory()})
async def test_one_that_cannot_start_does_not_stop_the_others(it):
    it.fleet.scale(3)
    done = await it.until_done()
    assert done["error"] == {"cause": "instance-1 does not start: no memory", "remedy": "buy some"}
    assert it.states() == {"instance-0": "up", "instance-2": "up"}
    assert it.fleet.state()["num_wanted"] == 2, "it would fail again"


@fleet_test(1, readies={(1, 1): Ready("m", "float32", "cpu", 32, make_geometry(), startup_s={})})
async def test_one_that_cannot_keep_the_promise_does_not_join(it):
    it.fleet.scale(2)
    done = await it.until_done()
    assert "can hold 32 tokens of a request, and this server promises 64" in done["error"]["cause"]
    assert it.states() == {"instance-0": "up"}
    assert it.instances[1].is_stopped


@fleet_test(2, max_num=4)
async def test_a_number_that_is_not_possible(it):
    for number in (0, -1, 5):
        with pytest.raises(InvalidRequest):
            it.fleet.scale(number)
    assert it.fleet.state()["change"] is None


@fleet_test(1, max_num=1)
async def test_without_ray_there_is_one(it):
    with pytest.raises(Conflict, match="without Ray") as refusal:
        it.fleet.scale(2)
    assert "--instances" in refusal.value.body()["error"]["remedy"]
    it.fleet.scale(1)
    assert (await it.until_done())["lines"] == []


@fleet_test(2)
async def test_one_that_leaves_is_not_restarted(it):
    it.driver.holds_drains = True
    it.fleet.scale(1)
    await it.until(lambda: it.states()["instance-1"] == "drained")
    it.driver.may_drain.set()
    await it.until_done()
    for _ in range(100):  # a restart would wait on the manual clock, which takes no time
        await asyncio.sleep(0)
    assert "start instance-1 2" not in it.driver.log


# --- rolling restart ---


@fleet_test(3)
async def test_a_rolling_restart_is_one_at_a_time(it):
    it.fleet.restart()
    done = await it.until_done()
    steps = [
        [f"drain {name}", f"remove {name}", f"start {name} 2", f"up {name}"]
        for name in ("instance-0", "instance-1", "instance-2")
    ]
    assert it.driver.log == [step for each in steps for step in each]
    assert done["error"] is None
    assert done["lines"][1] == "instance-0 is drained (0.5 s)"
    shown = it.fleet.state()["instances"]
    assert [instance["incarnation"] for instance in shown] == [2, 2, 2]
    assert [instance["num_restarts"] for instance in shown] == [0, 0, 0], "nothing was lost"
    assert shown[0]["pid"] == 102


@fleet_test(1)
async def test_one_alone_is_not_restarted(it):
    with pytest.raises(Conflict, match="nothing would serve") as refusal:
        it.fleet.restart()
    assert refusal.value.code == "nothing_would_serve"


@fleet_test(2)
async def test_a_fleet_of_which_none_is_up_is_renewed(it):
    it.fleet.drain("instance-0")
    await it.until_done()
    it.driver.lose("instance-1")
    it.holds = {1}
    await it.until(lambda: it.states()["instance-1"] == "starting")
    it.holds = set()
    it.fleet.restart()
    assert (await it.until_done())["error"] is None
    assert it.states() == {"instance-0": "up", "instance-1": "up"}


@fleet_test(1)
async def test_one_alone_that_is_drained_has_a_way_back(it):
    it.driver.up["instance-0"] = "draining"
    it.fleet.restart()
    assert (await it.until_done())["error"] is None
    assert it.states() == {"instance-0": "up"}
    assert it.instances[0].incarnation == 2


@fleet_test(3, faults={(1, 2): no_memory()})
async def test_one_that_does_not_come_back_ends_the_restart(it):
    it.holds = {2}  # so that a restart of it would hang
    it.fleet.restart()
    done = await it.until_done()
    assert done["error"] == {
        "cause": "instance-1 does not come up: no memory",
        "remedy": "buy some",
    }
    assert "drain instance-2" not in it.driver.log, "the others are untouched"
    assert it.states()["instance-2"] == "up"
    await it.until(lambda: it.states()["instance-1"] == "up")  # what fails later may pass
    assert it.instances[1].incarnation == 3


@fleet_test(2)
async def test_none_is_taken_out_while_no_other_is_up(it):
    it.driver.dies_at_once.add("instance-0")
    it.fleet.restart()
    done = await it.until_done()
    assert "no other instance than instance-1 is up" in done["error"]["cause"]
    assert it.states()["instance-1"] == "up"


@fleet_test(2, faults={(1, 2): no_memory()})
async def test_one_that_is_down_goes_first(it):
    it.driver.lose("instance-1")
    it.fleet.restart()
    assert (await it.until_done())["error"]
    assert it.states()["instance-0"] == "up"
    assert it.instances[0].incarnation == 1


# --- a drain of one ---


@fleet_test(2)
async def test_one_is_drained_until_it_is_renewed(it):
    it.driver.holds_drains = True
    it.driver.loads["instance-1"] = 3
    change = it.fleet.drain("instance-1")
    await it.until(lambda: it.states()["instance-1"] == "draining")
    assert it.fleet.drain("instance-1") is change
    it.driver.may_drain.set()
    await it.until_done()
    assert it.states()["instance-1"] == "drained"
    assert it.fleet.drain("instance-1") is None
    with pytest.raises(Conflict, match="no other instance than instance-0 is up"):
        it.fleet.drain("instance-0")
    it.fleet.restart()
    assert (await it.until_done())["error"] is None
    assert it.states() == {"instance-0": "up", "instance-1": "up"}
    starts = [line for line in it.driver.log if line.startswith("start")]
    assert starts == ["start instance-1 2", "start instance-0 2"], "who does not serve goes first"


@fleet_test(2)
async def test_only_what_is_up_can_be_drained(it):
    with pytest.raises(NotFound, match="there are: instance-0, instance-1"):
        it.fleet.drain("instance-7")
    it.holds = {1}
    it.driver.lose("instance-1")
    await it.until(lambda: it.states()["instance-1"] == "starting")
    with pytest.raises(Conflict, match="instance-1 is starting"):
        it.fleet.drain("instance-1")


@fleet_test(2)
async def test_one_that_is_lost_while_drained_comes_back_drained(it):
    it.fleet.drain("instance-1")
    await it.until_done()
    it.driver.lose("instance-1")
    await it.until(lambda: it.instances[1].incarnation == 2)
    await it.until(lambda: it.states()["instance-1"] != "starting")
    assert it.states()["instance-1"] == "drained"
    it.fleet.restart()
    await it.until_done()
    assert it.states() == {"instance-0": "up", "instance-1": "up"}


# --- one change at a time ---


@fleet_test(3)
async def test_a_second_change_is_told_to_wait(it):
    it.driver.holds_drains = True
    it.fleet.restart()
    for second in (
        it.fleet.restart,
        lambda: it.fleet.scale(2),
        lambda: it.fleet.drain("instance-2"),
    ):
        with pytest.raises(Conflict, match="rolling restart is under way"):
            second()
    assert it.fleet.state()["num_wanted"] == 3
    it.driver.may_drain.set()
    assert (await it.until_done())["number"] == 1
    it.fleet.scale(2)
    assert (await it.until_done())["number"] == 2


@fleet_test(2)
async def test_a_server_that_drains_is_not_changed(it):
    it.driver.draining = True
    for change in (
        it.fleet.restart,
        lambda: it.fleet.scale(3),
        lambda: it.fleet.drain("instance-1"),
    ):
        with pytest.raises(Conflict) as refusal:
            change()
        assert refusal.value.code == "draining"


@fleet_test(3)
async def test_a_restart_ends_when_the_server_begins_to_drain(it):
    it.driver.holds_drains = True
    it.fleet.restart()
    await it.until(lambda: it.states()["instance-0"] == "drained")
    it.driver.draining = True
    it.driver.may_drain.set()
    assert "the server drains" in (await it.until_done())["error"]["cause"]
    assert "drain instance-1" not in it.driver.log


@fleet_test(2)
async def test_the_end_of_the_server_ends_a_change(it):
    it.driver.holds_drains = True
    it.fleet.scale(1)
    await it.until(lambda: it.states()["instance-1"] == "drained")
    await it.fleet.stop()
    assert it.fleet.state()["change"] is None


@fleet_test(2)
async def test_a_loss_is_mended_and_counted(it):
    it.driver.lose("instance-1")
    await it.until(lambda: it.states()["instance-1"] == "up" and it.instances[1].incarnation == 2)
    shown = it.fleet.state()["instances"][1]
    assert (shown["incarnation"], shown["num_restarts"]) == (2, 1)
