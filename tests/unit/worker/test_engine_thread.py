"""EngineThread against engines that are scripted, blocked or broken."""

import asyncio
import threading
from collections.abc import Sequence

import pytest

from kvmesh.engine.api import Admitted, Computing, EngineRequest, Event, Failed, TokenOutput
from kvmesh.engine.fake import fake_engine
from kvmesh.errors import AlreadyExists, Unavailable
from kvmesh.types import SamplingParams
from kvmesh.worker.thread import EngineThread


def request(request_id: str, tokens: int = 20, max_tokens: int = 5) -> EngineRequest:
    return EngineRequest(request_id, tuple(range(tokens)), SamplingParams(max_tokens=max_tokens, temperature=0))


class Gate:
    """A real engine whose steps wait until they are let through, and fail when told to."""

    def __init__(self, open_: bool = True) -> None:
        self.core = fake_engine(blocks=64)
        self.open = threading.Event()
        self.entered = threading.Event()
        self.error: Exception | None = None
        self.steps = 0
        if open_:
            self.open.set()

    def __getattr__(self, name: str) -> object:
        return getattr(self.core, name)

    def step(self) -> Sequence[Event]:
        self.steps += 1
        self.entered.set()
        self.open.wait(10)
        if self.error:
            raise self.error
        return self.core.step()


async def collect(thread: EngineThread, request_id: str) -> list[Event]:
    subscription = thread.subscribe(request_id)
    events: list[Event] = []
    while not any(isinstance(event, TokenOutput) and event.last for event in events):
        events += await subscription.get()
    return events


async def test_events_arrive_in_order_and_only_at_their_subscriber() -> None:
    async with EngineThread(Gate()) as thread:
        waiting = [asyncio.create_task(collect(thread, name)) for name in ("a", "b")]
        await asyncio.sleep(0)
        for name in ("a", "b"):
            await thread.add(request(name))
        for name, events in zip(("a", "b"), await asyncio.gather(*waiting), strict=True):
            assert {event.request_id for event in events} == {name}
            assert [type(event) for event in events[:2]] == [Admitted, Computing]
            assert [event.offset for event in events if isinstance(event, TokenOutput)] == list(range(5))


async def test_get_takes_everything_that_became_ready_meanwhile() -> None:
    async with EngineThread(Gate()) as thread:
        slow = thread.subscribe("slow")
        await thread.add(request("slow"))
        await idle(thread)
        assert len([event for event in await slow.get() if isinstance(event, TokenOutput)]) == 5


async def idle(thread: EngineThread) -> None:
    """Returns once the engine has nothing to do; each turn of the loop waits for the engine's thread."""
    statistics = await thread.statistics()
    while statistics.running or statistics.waiting:
        statistics = await thread.statistics()


async def test_an_idle_engine_is_not_stepped() -> None:
    engine = Gate()
    async with EngineThread(engine) as thread:
        for _ in range(20):
            await thread.statistics()
        assert engine.steps == 0


async def test_errors_of_commands_reach_their_caller_and_nobody_else() -> None:
    engine = Gate()
    engine.core.add(request("held", max_tokens=2))
    async with EngineThread(engine) as thread:
        engine.open.clear()
        first = asyncio.create_task(thread.add(request("x")))
        second = asyncio.create_task(thread.add(request("x")))
        await asyncio.sleep(0)
        engine.open.set()
        assert await first is None
        with pytest.raises(AlreadyExists):
            await second
        assert thread.alive


async def test_a_failing_step_fails_every_request_and_all_that_comes_later() -> None:
    engine = Gate(open_=False)
    async with EngineThread(engine) as thread:
        subscriptions = [thread.subscribe(name) for name in ("a", "b")]
        await thread.add(request("a"))
        engine.error = RuntimeError("boom")
        pending = asyncio.create_task(thread.statistics())
        await asyncio.to_thread(engine.entered.wait, 10)
        engine.open.set()
        for subscription in subscriptions:
            (event,) = await subscription.get()
            assert isinstance(event, Failed)
            assert "boom" in str(event.error)
        await thread.failed.wait()
        assert not thread.alive
        with pytest.raises(Unavailable, match="boom"):
            await pending
        with pytest.raises(Unavailable, match="boom"):
            await thread.add(request("c"))
        thread.abort_soon("a")


async def test_abort_while_waiting_takes_effect_between_steps() -> None:
    engine = Gate(open_=False)
    async with EngineThread(engine) as thread:
        await thread.add(request("running"))
        await asyncio.to_thread(engine.entered.wait, 10)
        added = asyncio.create_task(thread.add(request("queued")))
        await asyncio.sleep(0)
        aborted = asyncio.create_task(thread.abort("queued"))
        await asyncio.sleep(0)
        engine.open.set()
        await added
        assert await aborted is True
        assert await thread.abort("queued") is False
        await thread.abort("running")
        statistics = await thread.statistics()
        assert (statistics.running, statistics.waiting, statistics.blocks_used) == (0, 0, 0)
        assert await thread.check_integrity() == []


async def test_a_cancelled_caller_does_not_stop_the_command_or_the_thread() -> None:
    engine = Gate(open_=False)
    async with EngineThread(engine) as thread:
        await thread.add(request("running"))
        await asyncio.to_thread(engine.entered.wait, 10)
        added = asyncio.create_task(thread.add(request("queued")))
        await asyncio.sleep(0)
        added.cancel()
        thread.abort_soon("queued")
        engine.open.set()
        await asyncio.gather(added, return_exceptions=True)
        await idle(thread)
        assert (await thread.statistics()).requests_total == 2


async def test_a_step_that_hangs_is_not_alive() -> None:
    engine = Gate(open_=False)
    async with EngineThread(engine, stall_seconds=0.0) as thread:
        assert thread.alive
        await thread.add(request("a"))
        await asyncio.to_thread(engine.entered.wait, 10)
        assert not thread.alive
        engine.open.set()


async def test_leaving_refuses_what_is_still_asked() -> None:
    thread = EngineThread(Gate())
    async with thread:
        pass
    with pytest.raises(Unavailable, match="stopped"):
        await thread.statistics()
