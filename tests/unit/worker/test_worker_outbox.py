"""Heartbeats fill silences, and only those."""

import asyncio

from kvmesh.worker.outbox import Outbox


class Reader:
    """Takes messages; `busy` makes it slow."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.free = asyncio.Event()
        self.free.set()
        self.got = asyncio.Event()

    async def write(self, message: str) -> None:
        await self.free.wait()
        self.messages.append(message)
        self.got.set()

    async def until(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.messages) < count:
                self.got.clear()
                await self.got.wait()


async def test_a_heartbeat_at_once_and_in_each_silence() -> None:
    reader = Reader()
    async with Outbox(reader.write, lambda: "beat", lambda: True, every=0.01) as outbox:
        assert reader.messages == ["beat"]
        await reader.until(3)
        await outbox.send("news")
        await reader.until(5)
    assert reader.messages.count("news") == 1
    assert reader.messages.count("beat") >= 4


async def test_no_heartbeat_from_a_worker_that_hangs() -> None:
    reader, asked = Reader(), asyncio.Semaphore(0)

    def alive() -> bool:
        asked.release()
        return False

    async with Outbox(reader.write, lambda: "beat", alive, every=0.001):
        for _ in range(3):
            await asked.acquire()
    assert reader.messages == ["beat"]


async def test_messages_keep_their_order_while_the_reader_is_slow() -> None:
    reader = Reader()
    async with Outbox(reader.write, lambda: "beat", lambda: True, every=0.001) as outbox:
        reader.free.clear()
        sending = [asyncio.create_task(outbox.send(str(i))) for i in range(3)]
        await asyncio.sleep(0)
        reader.free.set()
        await asyncio.gather(*sending)
    assert [message for message in reader.messages if message != "beat"] == ["0", "1", "2"]


async def test_leaving_ends_the_heartbeats() -> None:
    before = asyncio.all_tasks()
    async with Outbox(Reader().write, lambda: "beat", lambda: True, every=0.001):
        pass
    assert asyncio.all_tasks() == before


async def test_no_heartbeat_at_once_unless_told() -> None:
    reader = Reader()
    async with Outbox(reader.write, lambda: "beat", lambda: True, every=60, at_once=False) as outbox:
        await outbox.send("news")
    assert reader.messages == ["news"]
