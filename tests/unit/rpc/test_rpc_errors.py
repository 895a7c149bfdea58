"""Every error of the tree crosses the wire, both ways, on every kind of call."""

import asyncio
import logging

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from kvmesh.errors import (
    STATUS_TO_ERROR,
    Aborted,
    AlreadyExists,
    DeadlineExceeded,
    InvalidArgument,
    KvmeshError,
    Mismatch,
    NotFound,
    Overloaded,
    Unavailable,
)
from kvmesh.rpc.options import MAX_MESSAGE_BYTES
from kvmesh.rpc.status import from_rpc_error, to_status
from kvmesh.rpc.stream import stream, unary

ERRORS = [
    InvalidArgument(violations=[("top_p", "must be in (0, 1]"), ("n", "must be in [1, 64]")]),
    NotFound("no model named ‘x’"),
    AlreadyExists("request r1 is running"),
    Overloaded("the queue is full", retry_after=2.25),
    Mismatch("dtype differs: float32 here, float16 there"),
    Unavailable("draining"),
    DeadlineExceeded("the deadline passed"),
    Aborted("aborted"),
    KvmeshError("something else"),
]
KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


def failing(kind, error, first=()):
    """A handler of this kind that sends `first` and then raises."""
    if kind.endswith("unary"):

        async def unary_handler(request, context):
            raise error

        return unary_handler

    async def stream_handler(request, context):
        for message in first:
            yield message
        raise error

    return stream_handler


async def collect(call):
    async with stream(call):
        return [message async for message in call]


async def result(kind, call):
    return await (unary(call) if kind.endswith("unary") else collect(call))


def test_there_is_an_error_for_each_code_of_the_table():
    assert {type(error) for error in ERRORS} == {*STATUS_TO_ERROR.values(), KvmeshError}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_an_error_arrives_as_it_was_raised(mesh, kind, error):
    server = await mesh.serve(**{kind: failing(kind, error)})
    with pytest.raises(KvmeshError) as caught:
        await result(kind, mesh.call(server, kind)())
    assert type(caught.value) is type(error)
    assert str(caught.value) == str(error)
    assert getattr(caught.value, "violations", ()) == getattr(error, "violations", ())
    assert getattr(caught.value, "retry_after", 0) == getattr(error, "retry_after", 0)


async def test_messages_before_the_error_arrive(mesh):
    server = await mesh.serve(unary_stream=failing("unary_stream", Unavailable("gone"), first=[b"1", b"2"]))
    seen = []

    async def read():
        async with stream(mesh.call(server, "unary_stream")()) as call:
            async for message in call:
                seen.append(message)

    with pytest.raises(Unavailable):
        await read()
    assert seen == [b"1", b"2"]


async def test_a_handler_may_write_to_the_context(mesh):
    async def handler(request, context):
        await context.write(request)
        raise Overloaded("full", 3)

    server = await mesh.serve(unary_stream=handler)
    async with stream(mesh.call(server, "unary_stream")(b"x")) as call:
        assert await call.read() == b"x"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert from_rpc_error(caught.value).retry_after == 3


async def test_other_languages_find_the_details(mesh):
    server = await mesh.serve(unary_unary=failing("unary_unary", ERRORS[3]))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await mesh.call(server, "unary_unary")()
    details = rpc_status.from_call(caught.value).details
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in details)
    assert (info.reason, info.domain) == ("OVERLOADED", "kvmesh")
    assert any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in details)


@pytest.mark.parametrize(
    "bug", [ValueError("secret"), TimeoutError("secret"), asyncio.CancelledError("secret")], ids=repr
)
@pytest.mark.parametrize("kind", KINDS)
async def test_a_bug_is_internal_and_logged_with_its_traceback(mesh, caplog, kind, bug):
    server = await mesh.serve(**{kind: failing(kind, bug)})
    with caplog.at_level(logging.ERROR), pytest.raises(KvmeshError) as caught:
        await result(kind, mesh.call(server, kind)())
    assert type(caught.value) is KvmeshError
    assert "secret" not in str(caught.value)
    assert "secret" in caplog.text


async def test_a_status_set_by_the_handler_itself_stands(mesh):
    async def handler(request, context):
        await context.abort(grpc.StatusCode.NOT_FOUND, "mine")

    server = await mesh.serve(unary_unary=handler)
    with pytest.raises(NotFound, match="mine"):
        await unary(mesh.call(server, "unary_unary")())


async def test_an_unknown_method_is_an_error_of_the_tree(mesh):
    server = await mesh.serve()
    with pytest.raises(KvmeshError):
        await unary(mesh.call(server, "unary_unary")())


async def test_an_oversized_message_is_refused_and_leaves_the_server_well(mesh):
    calls = []

    async def handler(request, context):
        calls.append(len(request))
        return b"x" * (MAX_MESSAGE_BYTES + 1) if request == b"big" else b"ok"

    server = await mesh.serve(unary_unary=handler)
    call = mesh.call(server, "unary_unary")
    with pytest.raises(Overloaded) as caught:
        await unary(call(b"x" * (MAX_MESSAGE_BYTES + 1)))
    assert caught.value.retry_after == 0  # It would not fit later either.
    with pytest.raises(Overloaded):
        await unary(call(b"big"))
    assert await unary(call(b"small")) == b"ok"
    assert calls == [3, 5]


async def test_the_server_too_refuses_what_an_unbounded_client_sends(mesh):
    calls = []

    async def handler(request, context):
        calls.append(request)
        return b""

    server = await mesh.serve(unary_unary=handler)
    options = [("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(server.address, options=options) as channel:
        with pytest.raises(Overloaded):
            await unary(channel.unary_unary("/test.Echo/unary_unary")(b"x" * (MAX_MESSAGE_BYTES + 1)))
    assert calls == []


async def test_a_long_error_is_clipped_to_fit_the_metadata(mesh):
    violations = [(f"field_{'é' * 500}{i}", "格" * 5000) for i in range(200)]
    server = await mesh.serve(unary_unary=failing("unary_unary", InvalidArgument("長" * 100_000, violations)))
    with pytest.raises(InvalidArgument) as caught:
        await unary(mesh.call(server, "unary_unary")())
    assert str(caught.value).startswith("長長長")
    assert str(caught.value).endswith("…")
    assert 0 < len(caught.value.violations) < 200


@pytest.mark.parametrize("trailing", [b"\xff\xff not a status", status_pb2.Status(code=5).SerializeToString()])
def test_malformed_details_of_a_peer_do_no_harm(trailing):
    metadata = grpc.aio.Metadata(("grpc-status-details-bin", trailing))
    error = grpc.aio.AioRpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.aio.Metadata(), metadata, "full")
    translated = from_rpc_error(error)
    assert isinstance(translated, Overloaded)
    assert str(translated) == "full"


def test_a_call_that_the_peer_cancelled_may_be_served_by_another():
    error = grpc.aio.AioRpcError(grpc.StatusCode.CANCELLED, grpc.aio.Metadata(), grpc.aio.Metadata(), "bye")
    assert isinstance(from_rpc_error(error), Unavailable)


def test_no_retry_hint_without_a_time():
    details = to_status(Overloaded("too large", retry_after=0)).trailing_metadata[0][1]
    assert len(status_pb2.Status.FromString(details).details) == 1
