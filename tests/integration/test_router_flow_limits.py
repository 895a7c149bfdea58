"""What bounds a request: abort and cancellation in each phase, deadlines, the queue, bad input, clients that stall."""

import asyncio

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from kvmesh.types import Role
from kvmesh.v1 import common_pb2, router_pb2
from tests.integration.router_fakes import (
    ANSWER,
    Answer,
    RouterMesh,
    decode_until,
    decode_well,
    decoded,
    first_tokens,
    freeze,
    prefill_well,
    read,
    refuse,
    until,
)


@pytest.fixture
async def mesh():
    async with RouterMesh(stall_timeout=30) as mesh:
        yield mesh
        await mesh.settle()


async def publishing_freezes(request, context):
    yield first_tokens(request)
    async for message in freeze(request, context):
        yield message


PHASES = {
    "prefilling": (freeze, decode_well, 0, "prefill"),
    "publishing": (publishing_freezes, decode_well, 1, "prefill"),
    "fetching": (prefill_well, freeze, 1, "decode"),
    "decoding": (prefill_well, decode_until(7, freeze), 7, "decode"),
}


@pytest.fixture(params=PHASES)
async def frozen(request, mesh):
    """A mesh that comes to a halt in some phase: (where, after how many tokens, is the lease still the router's)."""
    prefill_script, decode_script, tokens, role = PHASES[request.param]
    prefill, decode = await mesh.add(Role.PREFILL, prefill_script), await mesh.add(Role.DECODE, decode_script)
    return prefill, {"prefill": prefill, "decode": decode}[role], tokens, request.param != "decoding"


async def reached(worker, answer, tokens):
    """Until the worker is at work and the client has so many tokens."""
    await until(lambda: worker.running > 0 and len(answer.tokens.get(0, ())) >= tokens)


async def assert_nothing_left(mesh, prefill, worker, leased):
    await mesh.settle()
    await until(lambda: not worker.running)
    assert prefill.released == ([prefill.requests[0].ticket.lease_id] if leased else [])


async def test_abort_in_each_phase_ends_the_request_and_frees_everything(mesh, frozen):
    prefill, worker, tokens, leased = frozen
    reading = asyncio.create_task(read(mesh.stream(request_id="mine"), answer := Answer()))
    await reached(worker, answer, tokens)
    assert (await mesh.inference.Abort(router_pb2.AbortRequest(request_id="mine"))).aborted
    await asyncio.wait_for(reading, 10)
    assert (answer.reason(), answer.finish.usage.completion_tokens) == ("ABORTED", tokens)
    assert answer.texts.get(0, "") == ANSWER[:tokens]
    await assert_nothing_left(mesh, prefill, worker, leased)
    assert not (await mesh.inference.Abort(router_pb2.AbortRequest(request_id="mine"))).aborted


async def test_cancellation_in_each_phase_frees_everything(mesh, frozen):
    prefill, worker, tokens, leased = frozen
    call, answer = mesh.stream(), Answer()
    reading = asyncio.create_task(read(call, answer))
    await reached(worker, answer, tokens)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await assert_nothing_left(mesh, prefill, worker, leased)


async def test_the_deadline_of_the_client_ends_each_phase(mesh, frozen):
    prefill, worker, _, leased = frozen
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await mesh.generate(timeout=0.8)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await assert_nothing_left(mesh, prefill, worker, leased)


async def test_the_default_deadline_holds_without_one():
    async with RouterMesh(stall_timeout=30, default_deadline=0.5) as mesh:
        worker = await mesh.add(Role.DECODE, freeze)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await mesh.generate(timeout=None)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await mesh.settle()
        assert len(worker.requests) == 1


async def test_one_too_many_is_refused_with_a_time_to_come_back():
    async with RouterMesh(max_concurrent=1, max_queued=1, stall_timeout=30) as mesh:
        await mesh.add(Role.DECODE, freeze)
        calls = [asyncio.create_task(read(mesh.stream(request_id=str(i)))) for i in range(2)]
        await until(lambda: mesh.router.flow.gate.admission.waiting == 1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await mesh.generate()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert retry_delay(caught.value) > 0
        queued = mesh.inference.Abort(router_pb2.AbortRequest(request_id="1"))
        assert (await queued).aborted
        assert (await calls[1]).reason() == "ABORTED"
        await mesh.inference.Abort(router_pb2.AbortRequest(request_id="0"))
        assert (await calls[0]).reason() == "ABORTED"
        await mesh.settle()


async def test_the_queue_moves_on_in_order():
    async with RouterMesh(max_concurrent=1, max_queued=9) as mesh:
        worker = await mesh.add(Role.DECODE, decode_well)
        answers = await asyncio.gather(*(mesh.generate(request_id=str(i)) for i in range(8)))
        assert [answer.text for answer in answers] == [ANSWER] * 8
        assert len(worker.requests) == 8
        await mesh.settle()


async def test_workers_that_are_all_busy_make_the_router_overloaded(mesh):
    for _ in range(2):
        await mesh.add(Role.DECODE, refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "the pool is full"))
    with pytest.raises(grpc.aio.AioRpcError, match="the pool is full") as caught:
        await mesh.generate()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_no_worker_is_unavailable_and_one_that_comes_is_waited_for(mesh):
    await mesh.add(Role.PREFILL, prefill_well)
    with pytest.raises(grpc.aio.AioRpcError, match="no decode worker serves fake") as caught:
        await mesh.generate()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    waiting = asyncio.create_task(mesh.generate())
    await until(lambda: len(mesh.router.flow.sessions) > 0)
    await mesh.add(Role.DECODE, decode_well)
    assert (await waiting).text == ANSWER


async def test_an_id_that_is_running_is_refused(mesh):
    await mesh.add(Role.DECODE, freeze)
    first = asyncio.create_task(read(mesh.stream(request_id="twin")))
    await until(lambda: len(mesh.router.flow.sessions) > 0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await mesh.generate(request_id="twin")
    assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
    await mesh.inference.Abort(router_pb2.AbortRequest(request_id="twin"))
    await first


async def test_bad_input_is_named_all_at_once(mesh):
    await mesh.add(Role.DECODE, decode_well)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await mesh.generate(
            "",
            sampling=common_pb2.SamplingParameters(temperature=float("nan"), top_p=0, n=0),
            stopping=common_pb2.StoppingParameters(stop=[""], max_tokens=0),
        )
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    bad = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad) for detail in rpc_status.from_call(caught.value).details)
    assert {v.field for v in bad.field_violations} == {"prompt", "temperature", "top_p", "n", "max_tokens", "stop"}


async def test_an_unknown_model_is_not_found_and_the_known_are_named(mesh):
    await mesh.add(Role.DECODE, decode_well)
    for call in (mesh.generate(model="gpt-9"), mesh.inference.GetModelInfo(router_pb2.GetModelInfoRequest(model="x"))):
        with pytest.raises(grpc.aio.AioRpcError, match="there is fake") as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_client_that_stops_reading_is_dropped_and_everything_freed():
    async def endless(request, context):
        token_ids = [0x61] * 4000
        for offset in range(0, 1 << 30, 4000):
            yield decoded(common_pb2.TokenBatch(index=0, offset=offset, token_ids=token_ids))
            await asyncio.sleep(0)

    async with RouterMesh(client_stall_timeout=0.5) as mesh:
        worker = await mesh.add(Role.DECODE, endless)
        messages = aiter(mesh.stream(timeout=60))
        await anext(messages)
        await until(lambda: worker.running > 0)
        await mesh.settle()
        await until(lambda: not worker.running)
        with pytest.raises(grpc.aio.AioRpcError, match="read nothing") as caught:
            await read(messages)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def retry_delay(error):
    info = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(info) for detail in rpc_status.from_call(error).details)
    return info.retry_delay.ToNanoseconds()
