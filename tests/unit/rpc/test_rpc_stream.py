"""An abandoned call ends on both sides, whichever way it was abandoned."""

import asyncio

import pytest

from kvmesh.errors import DeadlineExceeded, Unavailable
from kvmesh.rpc.deadline import Deadline, deadline_of
from kvmesh.rpc.stream import stream, unary


class Endless:
    """A stream that ends only by force, and says how it ended."""

    def __init__(self, size=1):
        self.ended = asyncio.Event()
        self.size = size

    async def handler(self, request, context):
        try:
            while True:
                yield b"x" * self.size
                await asyncio.sleep(0)
        finally:
            self.ended.set()


@pytest.fixture
def endless():
    return Endless()


async def test_leaving_by_break_cancels_the_server(mesh, endless):
    server = await mesh.serve(unary_stream=endless.handler)
    async with stream(mesh.call(server, "unary_stream")()) as call:
        async for _ in call:
            break
    await asyncio.wait_for(endless.ended.wait(), 5)
    assert call.cancelled()


async def test_leaving_by_an_error_cancels_the_server(mesh, endless):
    server = await mesh.serve(unary_stream=endless.handler)

    async def fail():
        async with stream(mesh.call(server, "unary_stream")()) as call:
            await call.read()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    await asyncio.wait_for(endless.ended.wait(), 5)


async def test_cancelling_the_reader_cancels_the_server(mesh, endless):
    server = await mesh.serve(unary_stream=endless.handler)
    reading = asyncio.Event()

    async def read():
        async with stream(mesh.call(server, "unary_stream")()) as call:
            async for _ in call:
                reading.set()

    task = asyncio.create_task(read())
    await asyncio.wait_for(reading.wait(), 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(endless.ended.wait(), 5)


async def test_a_handler_that_waits_for_a_slow_reader_is_closed_too(mesh):
    """It is suspended in its write, not in its own code: the generator must be closed all the same."""
    endless = Endless(size=1 << 20)
    server = await mesh.serve(unary_stream=endless.handler)
    async with stream(mesh.call(server, "unary_stream")()) as call:
        await call.read()
        await asyncio.sleep(0.05)  # Lets flow control fill up; the test holds either way.
    await asyncio.wait_for(endless.ended.wait(), 5)


async def test_cancelling_a_unary_call_cancels_the_server(mesh):
    started, ended = asyncio.Event(), asyncio.Event()

    async def handler(request, context):
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    server = await mesh.serve(unary_unary=handler)
    task = asyncio.create_task(unary(mesh.call(server, "unary_unary")()))
    await asyncio.wait_for(started.wait(), 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(ended.wait(), 5)


async def test_a_stream_read_to_its_end_is_not_an_error(mesh):
    async def handler(request, context):
        yield request

    server = await mesh.serve(unary_stream=handler)
    async with stream(mesh.call(server, "unary_stream")(b"x")) as call:
        assert [message async for message in call] == [b"x"]
    assert not call.cancelled()


async def test_a_peer_that_is_not_there_is_unavailable(mesh):
    server = await mesh.serve()
    await server.drain(0)
    with pytest.raises(Unavailable):
        await unary(mesh.call(server, "unary_unary")(timeout=5))


async def test_the_deadline_of_a_call_ends_it_on_both_sides(mesh, endless):
    seen = []

    async def handler(request, context):
        seen.append(deadline_of(context, default=1000).remaining())
        async for message in endless.handler(request, context):
            yield message

    server = await mesh.serve(unary_stream=handler)

    async def read():
        async with stream(mesh.call(server, "unary_stream")(timeout=0.2)) as call:
            async for _ in call:
                pass

    with pytest.raises(DeadlineExceeded):
        await read()
    assert 0 <= seen[0] <= 0.3
    await asyncio.wait_for(endless.ended.wait(), 5)


async def test_without_a_deadline_the_default_holds(mesh):
    async def handler(request, context):
        return str(deadline_of(context, default=1000).remaining()).encode()

    server = await mesh.serve(unary_unary=handler)
    assert 990 < float(await unary(mesh.call(server, "unary_unary")())) <= 1000


def test_a_deadline_counts_down_to_zero_and_no_further():
    assert Deadline.after(-1).expired
    assert Deadline.after(-1).remaining() == 0
    assert not Deadline.after(100).expired
    assert 0 < Deadline.after(100).earlier(90).remaining() <= 10
    assert Deadline.after(100).earlier(200).expired
    assert Deadline(1.0) < Deadline(2.0)
