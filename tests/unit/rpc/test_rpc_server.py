"""Health, reflection, drain, and the connections to it."""

import asyncio

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvmesh.errors import NotFound, Overloaded, Unavailable
from kvmesh.rpc.channel import ChannelPool
from kvmesh.rpc.status import from_rpc_error
from kvmesh.rpc.stream import stream, unary
from kvmesh.rpc.worker_service import NAME, WorkerServicer
from kvmesh.types import Role, WorkerInfo, WorkerStatistics
from kvmesh.v1 import common_pb2 as pb
from kvmesh.v1.common_pb2_grpc import WorkerServiceStub

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
INFO = WorkerInfo("decode-1", 7, Role.DECODE, "127.0.0.1:1", 42, layout={"dtype": "float32"})


def check(mesh, server, service):
    stub = health_pb2_grpc.HealthStub(mesh.pool().get(server.address))
    return unary(stub.Check(health_pb2.HealthCheckRequest(service=service)))


def watch(mesh, server, service):
    stub = health_pb2_grpc.HealthStub(mesh.pool().get(server.address))
    return stream(stub.Watch(health_pb2.HealthCheckRequest(service=service)))


async def test_health_is_told_per_service(mesh):
    server = await mesh.serve()
    assert (await check(mesh, server, "")).status == SERVING
    assert (await check(mesh, server, "test.Echo")).status == SERVING
    server.health.set("test.Echo", False)
    assert (await check(mesh, server, "test.Echo")).status == NOT_SERVING
    assert (await check(mesh, server, "")).status == SERVING
    with pytest.raises(NotFound):
        await check(mesh, server, "test.Other")


async def test_a_watch_tells_each_change_and_ends_with_the_drain(mesh):
    server = await mesh.serve()
    async with watch(mesh, server, "test.Echo") as echo, watch(mesh, server, "test.Other") as other:
        assert (await echo.read()).status == SERVING
        assert (await other.read()).status == SERVICE_UNKNOWN
        server.health.set("test.Echo", False)
        assert (await echo.read()).status == NOT_SERVING
        server.health.set("test.Echo", True)
        server.health.set("test.Other", True)
        assert (await echo.read()).status == SERVING
        assert (await other.read()).status == SERVING
        await asyncio.wait_for(server.drain(grace=60), 10)  # Open watches do not hold it up.
        assert (await echo.read()).status == NOT_SERVING
        assert await echo.read() is grpc.aio.EOF


async def test_reflection_lists_the_services(mesh):
    servicer = WorkerServicer(INFO, lambda _: WorkerStatistics())
    server = await mesh.serve_services([servicer.service])
    stub = reflection_pb2_grpc.ServerReflectionStub(mesh.pool().get(server.address))
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=NAME),
    ]
    async with stream(stub.ServerReflectionInfo(iter(requests))) as call:
        listed, described = [reply async for reply in call]
    names = {service.name for service in listed.list_services_response.service}
    assert {NAME, "grpc.health.v1.Health"} <= names
    assert described.file_descriptor_response.file_descriptor_proto


async def test_draining_lets_calls_finish_and_refuses_new_ones(mesh):
    started, finish = asyncio.Event(), asyncio.Event()

    async def handler(request, context):
        yield b"1"
        started.set()
        await finish.wait()
        yield b"2"

    server = await mesh.serve(unary_stream=handler)
    async with stream(mesh.call(server, "unary_stream")()) as call:
        assert await call.read() == b"1"
        await started.wait()
        draining = asyncio.create_task(server.drain(grace=60))
        await asyncio.sleep(0)  # One turn of the loop: draining has begun.
        assert not server.health.serving()
        with pytest.raises(Unavailable):
            await unary(mesh.call(server, "unary_unary")(timeout=10))
        assert not draining.done()
        finish.set()
        assert [await call.read(), await call.read()] == [b"2", grpc.aio.EOF]
    await asyncio.wait_for(draining, 10)
    await server.drain(grace=0)


async def test_a_call_that_outlasts_the_grace_is_cancelled(mesh):
    ended = asyncio.Event()

    async def handler(request, context):
        try:
            yield b"1"
            await asyncio.Event().wait()
        finally:
            ended.set()

    server = await mesh.serve(unary_stream=handler)
    async with stream(mesh.call(server, "unary_stream")()) as call:
        assert await call.read() == b"1"
        await server.drain(grace=0.05)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert isinstance(from_rpc_error(caught.value), Unavailable)
    await asyncio.wait_for(ended.wait(), 5)


async def test_a_port_in_use_is_one_clear_error(mesh):
    server = await mesh.serve()
    port = int(server.address.rpartition(":")[2])
    with pytest.raises(Unavailable, match=f"cannot listen on 127.0.0.1:{port}"):
        await mesh.serve(port=port)


async def test_channels_are_shared_and_a_discarded_one_is_replaced(mesh):
    async def handler(request, context):
        return request

    server = await mesh.serve(unary_unary=handler)
    pool = mesh.pool()
    channel = pool.get(server.address)
    assert pool.get(server.address) is channel
    assert await unary(mesh.call(server, "unary_unary")(b"x")) == b"x"
    pool.discard(server.address)
    pool.discard(server.address)
    assert pool.get(server.address) is not channel
    assert await unary(mesh.call(server, "unary_unary")(b"y")) == b"y"


async def test_a_channel_finds_a_restarted_server_again(mesh):
    async def handler(request, context):
        return request

    server = await mesh.serve(unary_unary=handler)
    call = mesh.call(server, "unary_unary")
    assert await unary(call(b"x")) == b"x"
    await server.drain(0)
    await mesh.serve(unary_unary=handler, port=int(server.address.rpartition(":")[2]))
    assert await unary(call(b"y", wait_for_ready=True, timeout=10)) == b"y"


async def test_the_options_of_a_pool_can_be_overridden(mesh):
    async def handler(request, context):
        return request

    server = await mesh.serve(unary_unary=handler)
    async with ChannelPool(channel_options=(("grpc.max_send_message_length", 10),)) as pool:
        with pytest.raises(Overloaded):
            await unary(pool.get(server.address).unary_unary("/test.Echo/unary_unary")(b"x" * 11))


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_worker_service_says_who_and_how(mesh, asynchronous):
    checks = []

    def read(check_integrity):
        checks.append(check_integrity)
        return WorkerStatistics(running=3, integrity_errors=["block 4 leaks"] if check_integrity else [])

    async def read_later(check_integrity):
        return read(check_integrity)

    servicer = WorkerServicer(INFO if asynchronous else lambda: INFO, read_later if asynchronous else read)
    server = await mesh.serve_services([servicer.service])
    stub = WorkerServiceStub(mesh.pool().get(server.address))
    info = (await unary(stub.GetWorkerInfo(pb.GetWorkerInfoRequest()))).info
    assert (info.worker_id, info.epoch, info.layout["dtype"]) == ("decode-1", 7, "float32")
    reply = await unary(stub.GetStatistics(pb.GetStatisticsRequest(check_integrity=True)))
    assert (reply.statistics.running, [*reply.statistics.integrity_errors]) == (3, ["block 4 leaks"])
    await unary(stub.GetStatistics(pb.GetStatisticsRequest()))
    assert checks == [True, False]


async def test_statistics_of_a_process_that_starts_are_unavailable(mesh):
    def starting(check_integrity):
        raise Unavailable("starting")

    server = await mesh.serve_services([WorkerServicer(INFO, starting).service])
    stub = WorkerServiceStub(mesh.pool().get(server.address))
    with pytest.raises(Unavailable, match="starting"):
        await unary(stub.GetStatistics(pb.GetStatisticsRequest()))
