"""Waiting: success, silence, deadline, abort and cancellation, and the gate on top of it."""

import asyncio

import pytest

from kvmesh.errors import AlreadyExists, DeadlineExceeded, Overloaded
from kvmesh.rpc.deadline import Deadline
from kvmesh.scheduling.admission import Admission
from kvmesh_router.gate import Gate
from kvmesh_router.janitor import Janitor
from kvmesh_router.session import RequestAborted, Session, Sessions, Silent


def session(seconds=60.0):
    return Session("r", Deadline.after(seconds))


def never():
    return asyncio.get_running_loop().create_future()


async def test_each_way_a_wait_ends():
    assert await session().wait(asyncio.sleep(0, "done"), 5) == "done"
    with pytest.raises(Silent, match=r"worker-1 was silent for 0\.01 s"):
        await session().wait(never(), 0.01, "worker-1")
    with pytest.raises(DeadlineExceeded):
        await session(0.01).wait(never(), 60)
    with pytest.raises(DeadlineExceeded):
        await session(0).wait(never())
    with pytest.raises(KeyError):
        await session().wait(asyncio.wait_for(raising(KeyError()), 1))
    with pytest.raises(TimeoutError):
        await session().wait(raising(TimeoutError("its own")))


async def raising(error):
    raise error


async def test_abort_ends_the_present_wait_and_all_later_ones():
    one = session()
    asyncio.get_running_loop().call_soon(one.abort)
    for _ in range(2):
        with pytest.raises(RequestAborted):
            await one.wait(never())
    one.abort()


async def test_cancellation_passes():
    task = asyncio.create_task(session().wait(never()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_ids_are_unique_while_running():
    sessions = Sessions()
    with sessions.open("a", Deadline.after(9)) as one:
        with pytest.raises(AlreadyExists), sessions.open("a", Deadline.after(9)):
            pass
        assert sessions.abort("a")
        assert one.aborted
    assert not sessions.abort("a")
    assert len(sessions) == 0


async def test_gate_lets_in_in_order_and_forgets_who_left():
    gate, order = Gate(Admission(1, 2)), []
    release = {name: asyncio.Event() for name in "abc"}

    async def pass_through(name):
        async with gate.enter(Session(name, Deadline.after(60))):
            order.append(name)
            await release[name].wait()

    tasks = {name: asyncio.create_task(pass_through(name)) for name in "abc"}
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await pass_through("d")
    tasks["b"].cancel()
    release["a"].set()
    release["c"].set()
    await asyncio.gather(*tasks.values(), return_exceptions=True)
    assert order == ["a", "c"]
    assert (gate.admission.running, gate.admission.waiting) == (0, 0)


async def test_gate_ends_a_wait_at_the_deadline():
    gate = Gate(Admission(1, 1))
    async with gate.enter(session()):
        with pytest.raises(DeadlineExceeded):
            async with gate.enter(Session("late", Deadline.after(0.01))):
                pass
        assert gate.admission.waiting == 0


async def test_janitor_bounds_logs_and_awaits_its_jobs(caplog):
    janitor, done = Janitor(patience=0.05), []

    async def good():
        await asyncio.sleep(0.001)
        done.append(1)

    janitor.take("good", good())
    janitor.take("bad", raising(ValueError("broken")))
    janitor.take("endless", never_ending())
    await janitor.close()
    assert (done, len(janitor)) == ([1], 0)
    assert {record.message for record in caplog.records} == {"bad failed: broken", "endless failed: TimeoutError"}


async def never_ending():
    await asyncio.Event().wait()
