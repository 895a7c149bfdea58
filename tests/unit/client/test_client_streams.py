"""Both clients over real gRPC: events in order, typed errors, and cancellation that reaches the router."""

import asyncio

import pytest

from kvmesh.client import AsyncClient, Client, Delta, Finish, PromptInfo
from kvmesh.errors import DeadlineExceeded, InvalidArgument, Overloaded, Unavailable
from kvmesh.types import FinishReason, Role
from kvmesh.v1 import common_pb2, router_pb2
from tests.unit.client.scripted_router import (
    ScriptedRouter,
    delta_message,
    finish_message,
    prompt_message,
    serving_router,
    threaded_router,
)

ANSWER = (prompt_message(), delta_message("Par", 1), delta_message("is", 2), finish_message())
WAITING = (prompt_message(), delta_message("Par", 1), None)
WORKER = common_pb2.WorkerInfo(
    worker_id="decode-0", epoch=3, role=common_pb2.WORKER_ROLE_DECODE, address="127.0.0.1:1", pid=9
)


def check_answer(events):
    prompt, *deltas, finish = events
    assert isinstance(prompt, PromptInfo)
    assert (prompt.model, prompt.prompt_tokens, prompt.seed) == ("m", 3, 7)
    assert [(d.text, d.token_offset, d.token_ids) for d in deltas] == [("Par", 1, (1,)), ("is", 2, (2,))]
    assert isinstance(finish, Finish)
    assert (finish.choices[0].reason, finish.choices[0].stop) == (FinishReason.STOP, "\n")
    assert finish.choices[0].stop_token_id is None
    assert (finish.usage.cached_tokens, finish.timings.total_seconds, finish.recoveries) == (1, 1.5, 1)


async def test_events_arrive_typed_and_in_order():
    router = ScriptedRouter(ANSWER)
    async with serving_router(router) as address, AsyncClient(address) as client:
        async with client.generate("hi", temperature=0.0) as stream:
            check_answer([event async for event in stream])
        assert router.requests[0].request_id == stream.request_id
        assert router.requests[0].text == "hi"


async def test_complete_is_one_reply():
    async with serving_router(ScriptedRouter(ANSWER)) as address, AsyncClient(address) as client:
        completion = await client.complete(chat=[{"role": "user", "content": "hi"}])
    assert completion.text == "Paris"
    assert completion.outputs[0].token_offset == 2
    assert completion.finish.usage.completion_tokens == 2


async def test_leaving_the_context_cancels_the_call():
    router = ScriptedRouter(WAITING)
    async with serving_router(router) as address, AsyncClient(address) as client:
        async with client.generate("hi") as stream:
            async for event in stream:
                if isinstance(event, Delta):
                    break
        await asyncio.wait_for(router.cancelled.wait(), 10)


async def test_dropping_a_stream_cancels_the_call():
    router = ScriptedRouter(WAITING)
    async with serving_router(router) as address, AsyncClient(address) as client:
        async for event in client.generate("hi"):
            if isinstance(event, Delta):
                break
        await asyncio.wait_for(router.cancelled.wait(), 10)


async def test_cancelling_the_reader_cancels_the_call():
    router = ScriptedRouter(WAITING)
    started = asyncio.Event()

    async def read(client):
        async with client.generate("hi") as stream:
            async for _ in stream:
                started.set()

    async with serving_router(router) as address, AsyncClient(address) as client:
        reader = asyncio.create_task(read(client))
        await started.wait()
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        await asyncio.wait_for(router.cancelled.wait(), 10)


async def test_abort_names_the_request():
    router = ScriptedRouter(ANSWER)
    async with serving_router(router) as address, AsyncClient(address) as client:
        stream = client.generate("hi")
        assert await stream.abort()
        assert router.aborted == [stream.request_id]


async def collect(stream, seen):
    async for event in stream:
        seen.append(event)


async def test_errors_of_the_router_come_back_as_themselves():
    violations = (("top_p", "must be in (0, 1]"), ("n", "must be in [1, 64]"))
    router = ScriptedRouter([InvalidArgument(violations=violations)])
    async with serving_router(router) as address, AsyncClient(address) as client:
        with pytest.raises(InvalidArgument) as caught:
            await collect(client.generate("hi"), [])
    assert caught.value.violations == violations


async def test_an_error_after_tokens_is_raised_after_them():
    script = (prompt_message(), delta_message("Par", 1), Overloaded("stopped reading", retry_after=2.5))
    seen = []
    async with serving_router(ScriptedRouter(script)) as address, AsyncClient(address) as client:
        with pytest.raises(Overloaded, match="stopped reading") as caught:
            await collect(client.generate("hi"), seen)
    assert len(seen) == 2
    assert caught.value.retry_after == pytest.approx(2.5)


async def test_a_deadline_ends_the_stream():
    async with serving_router(ScriptedRouter(WAITING)) as address, AsyncClient(address) as client:
        with pytest.raises(DeadlineExceeded):
            [_ async for _ in client.generate("hi", timeout=0.2)]


async def test_nobody_there():
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(Unavailable):
            await client.complete("hi", timeout=10)


async def test_models_and_status():
    silent = router_pb2.WorkerStatus(info=WORKER, error="no answer")
    reading = common_pb2.WorkerStatistics(running=2, integrity_errors=["lost a block"])
    router = ScriptedRouter(
        models=[router_pb2.ModelInfo(name="m", max_model_len=64, eos_token_ids=[1, 2], has_chat_template=True)],
        workers=[silent, router_pb2.WorkerStatus(info=WORKER, statistics=reading)],
    )
    async with serving_router(router) as address, AsyncClient(address) as client:
        (model,) = await client.models()
        dead, live = await client.status(check=True)
    assert (model.name, model.eos_token_ids, model.has_chat_template) == ("m", (1, 2), True)
    assert (dead.statistics, dead.error) == (None, "no answer")
    assert (live.info.role, live.statistics.running) == (Role.DECODE, 2)
    assert live.statistics.integrity_errors == ["lost a block"]


def test_the_synchronous_client_sees_the_same():
    with threaded_router(ScriptedRouter(ANSWER)) as (address, _), Client(address) as client:
        with client.generate("hi") as stream:
            check_answer(list(stream))
        assert client.complete("hi").text == "Paris"
        assert client.models() == []
        assert client.status() == []


def test_leaving_a_synchronous_stream_cancels_the_call():
    router = ScriptedRouter(WAITING)
    with threaded_router(router) as (address, loop), Client(address) as client:
        with client.generate("hi") as stream:
            next(stream)
            next(stream)
        asyncio.run_coroutine_threadsafe(asyncio.wait_for(router.cancelled.wait(), 10), loop).result(15)


def test_the_synchronous_client_raises_typed_errors():
    with threaded_router(ScriptedRouter([Overloaded("full", 0.5)])) as (address, _), Client(address) as client:
        stream = client.generate("hi")
        with pytest.raises(Overloaded, match="full"):
            list(stream)


class InterruptedLoop:
    """Hands work over to a loop, and is interrupted at once."""

    def __init__(self, loop):
        self.loop = loop

    def call_soon_threadsafe(self, *work):
        self.loop.call_soon_threadsafe(*work)
        self.call_soon_threadsafe = self.loop.call_soon_threadsafe
        raise KeyboardInterrupt


def test_an_interrupt_before_waiting_cancels_too(monkeypatch):
    """Ctrl-C between two statements: what had been handed to the loop must not run on while the stream is closed."""
    router = ScriptedRouter(WAITING)
    with threaded_router(router) as (address, loop), Client(address) as client:
        with client.generate("hi") as stream:
            next(stream)
            next(stream)
            monkeypatch.setattr(client._loop, "_loop", InterruptedLoop(client._loop._loop))
            with pytest.raises(KeyboardInterrupt):
                next(stream)
            monkeypatch.undo()
        asyncio.run_coroutine_threadsafe(asyncio.wait_for(router.cancelled.wait(), 10), loop).result(15)
