"""Every way out of a session, and what is left behind."""

import asyncio

import pytest

from kvmesh.engine.api import TokenOutput
from kvmesh.engine.fake import fake_engine
from kvmesh.errors import Aborted, AlreadyExists, DeadlineExceeded, Unavailable
from kvmesh.rpc.deadline import Deadline
from kvmesh.worker.session import Sessions
from kvmesh.worker.thread import EngineThread
from tests.unit.worker.fakes import job


def later() -> Deadline:
    return Deadline.after(600)


class Bench:
    """Sessions on an engine, and a request that stays reserved until something ends it."""

    def __init__(self) -> None:
        self.thread = EngineThread(fake_engine(blocks=256))
        self.sessions = Sessions(self.thread)
        self.inside = asyncio.Event()

    async def __aenter__(self) -> "Bench":
        await self.thread.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        statistics = await self.thread.statistics()
        assert (statistics.running, statistics.waiting, statistics.blocks_used) == (0, 0, 0)
        assert await self.thread.check_integrity() == []
        assert len(self.sessions) == 0
        await self.thread.__aexit__(*exc_info)

    async def stay(self, deadline: Deadline | None = None) -> None:
        async with self.sessions.open("r", deadline or later()) as session:
            await self.thread.add(job().engine_request(load_kv=True))
            await session.admitted()
            self.inside.set()
            await session.events()

    async def staying(self) -> asyncio.Task[None]:
        task = asyncio.create_task(self.stay())
        await self.inside.wait()
        return task


async def test_admitted_keeps_the_events_that_came_with_it() -> None:
    async with Bench() as bench, bench.sessions.open("r", later()) as session:
        await bench.thread.add(job().engine_request(load_kv=False))
        assert (await session.admitted()).cached_tokens == 0
        outputs: list[TokenOutput] = []
        while len(outputs) < 8:
            outputs += [event for event in await session.events() if isinstance(event, TokenOutput)]
        assert [output.offset for output in outputs] == list(range(8))
        assert session.computing_at is not None


async def test_cancelled() -> None:
    async with Bench() as bench:
        task = await bench.staying()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_aborted() -> None:
    async with Bench() as bench:
        task = await bench.staying()
        assert await bench.sessions.abort("r") is True
        assert await bench.sessions.abort("r") is False
        with pytest.raises(Aborted):
            await task
        assert task.cancelling() == 0


async def test_a_cancellation_beside_the_abort_stays_a_cancellation() -> None:
    async with Bench() as bench:
        task = await bench.staying()
        aborting = asyncio.create_task(bench.sessions.abort("r"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await aborting


async def test_late() -> None:
    async with Bench() as bench:
        with pytest.raises(DeadlineExceeded):
            await bench.stay(Deadline.after(0.02))
        with pytest.raises(DeadlineExceeded):
            await bench.stay(Deadline.after(0))


async def test_the_same_id_twice_disturbs_nobody() -> None:
    async with Bench() as bench:
        task = await bench.staying()
        with pytest.raises(AlreadyExists):
            await bench.stay()
        assert (await bench.thread.statistics()).blocks_used > 0
        await bench.sessions.abort("r")
        with pytest.raises(Aborted):
            await task


async def test_a_refused_request_leaves_its_id_free() -> None:
    async with Bench() as bench:
        for _ in range(2):
            async with bench.sessions.open("r", later()):
                with pytest.raises(Exception, match="tokens"):
                    await bench.thread.add(job(5000).engine_request(load_kv=True))


async def test_drained_with_grace() -> None:
    async with Bench() as bench:
        task = await bench.staying()
        draining = asyncio.create_task(bench.sessions.drain(60))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="draining"):
            await bench.stay()
        assert not draining.done()
        task.cancel()
        await draining


async def test_drained_without_grace() -> None:
    async with Bench() as bench:
        task = await bench.staying()
        await bench.sessions.drain(0)
        with pytest.raises(Unavailable, match="draining"):
            await task


async def test_drained_when_idle() -> None:
    async with Bench() as bench:
        await bench.sessions.drain(60)
        assert bench.sessions.draining
