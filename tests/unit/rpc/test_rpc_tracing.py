"""One trace over two hops; what the spans say of calls that end well, badly, or not at all."""

import asyncio
import json
from itertools import pairwise

import grpc.aio
import pytest

from kvmesh import telemetry
from kvmesh.errors import DeadlineExceeded, NotFound
from kvmesh.rpc.server import Service
from kvmesh.rpc.stream import stream, unary
from kvmesh.rpc.worker_service import WorkerServicer
from kvmesh.types import Role, WorkerInfo
from kvmesh.v1 import decode_pb2
from kvmesh.v1.decode_pb2_grpc import DecodeServiceServicer, DecodeServiceStub, add_DecodeServiceServicer_to_server


class Traced:
    """A telemetry per service into one file, and the spans in it."""

    def __init__(self, folder):
        self.path = folder / "spans.jsonl"
        self._made = []

    def telemetry(self, service):
        self._made.append(telemetry.setup(service, f"{service}-1", trace_file=self.path))
        return self._made[-1]

    def shutdown(self):
        for made in self._made:
            made.shutdown()

    def spans(self):
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    async def until(self, count):
        """Spans of servers end after their clients saw the end."""
        async with asyncio.timeout(5):
            while len(self.spans()) < count:  # noqa: ASYNC110  # A file tells nobody.
                await asyncio.sleep(0.005)
        return self.spans()


@pytest.fixture
def traced(tmp_path):
    traced = Traced(tmp_path)
    yield traced
    traced.shutdown()


def one(spans, **wanted):
    found = [span for span in spans if all(span[key] == value for key, value in wanted.items())]
    assert len(found) == 1, (wanted, spans)
    return found[0]


async def test_two_hops_are_one_trace(mesh, traced):
    client, router, worker = (traced.telemetry(name) for name in ("client", "router", "worker"))

    async def echo(request, context):
        with worker.tracer.start_as_current_span("compute", attributes={"tokens": 3}):
            yield request

    async def relay(request, context):
        async with stream(mesh.call(behind, "unary_stream", router)(request)) as call:
            async for message in call:
                yield message

    behind = await mesh.serve(telemetry=worker, unary_stream=echo)
    front = await mesh.serve(telemetry=router, unary_stream=relay)
    with client.tracer.start_as_current_span("request"):
        async with stream(mesh.call(front, "unary_stream", client)(b"x")) as call:
            assert [message async for message in call] == [b"x"]

    spans = await traced.until(6)
    assert len({span["trace_id"] for span in spans}) == 1
    chain = [
        one(spans, name="request", parent_span_id=None),
        one(spans, service="client", kind="CLIENT"),
        one(spans, service="router", kind="SERVER"),
        one(spans, service="router", kind="CLIENT"),
        one(spans, service="worker", kind="SERVER"),
        one(spans, name="compute"),
    ]
    for parent, child in pairwise(chain):
        assert child["parent_span_id"] == parent["span_id"]
    server = chain[4]
    assert server["name"] == "test.Echo/unary_stream"
    assert server["status"] == "UNSET"
    assert server["attributes"] == {
        "rpc.system": "grpc",
        "rpc.service": "test.Echo",
        "rpc.method": "unary_stream",
        "rpc.grpc.status_code": 0,
    }
    assert server["start"] <= chain[5]["start"] <= chain[5]["end"] <= server["end"]


async def test_a_failed_call_has_its_code_on_both_sides(mesh, traced):
    service = traced.telemetry("service")

    async def handler(request, context):
        raise NotFound("nothing here")

    server = await mesh.serve(telemetry=service, unary_unary=handler, stream_unary=handler)
    for kind in ("unary_unary", "stream_unary"):
        with pytest.raises(NotFound):
            await unary(mesh.call(server, kind, service)())
    spans = await traced.until(4)
    assert {(span["status"], span["status_description"]) for span in spans} == {("ERROR", "not_found")}
    assert {span["attributes"]["rpc.grpc.status_code"] for span in spans} == {5}


async def test_an_abandoned_stream_is_an_error_named_cancelled(mesh, traced):
    service = traced.telemetry("service")

    async def handler(request, context):
        while True:
            yield b"x"
            await asyncio.sleep(0)

    server = await mesh.serve(telemetry=service, unary_stream=handler)
    async with stream(mesh.call(server, "unary_stream", service)()) as call:
        await call.read()
    spans = await traced.until(2)
    assert {span["kind"] for span in spans} == {"CLIENT", "SERVER"}
    assert {(span["status"], span["status_description"]) for span in spans} == {("ERROR", "cancelled")}


async def test_a_call_past_its_deadline_says_so_on_both_sides(mesh, traced):
    service = traced.telemetry("service")

    async def handler(request, context):
        await asyncio.Event().wait()

    server = await mesh.serve(telemetry=service, unary_unary=handler)
    with pytest.raises(DeadlineExceeded):
        await unary(mesh.call(server, "unary_unary", service)(timeout=0.1))
    spans = await traced.until(2)
    assert {(span["status"], span["status_description"]) for span in spans} == {("ERROR", "deadline_exceeded")}


async def test_the_spans_of_a_call_name_its_request(mesh, traced):
    class Decode(DecodeServiceServicer):
        async def Decode(self, request, context):
            yield decode_pb2.DecodeResponse()

    service = traced.telemetry("service")
    add = Service("kvmesh.v1.DecodeService", lambda server: add_DecodeServiceServicer_to_server(Decode(), server))
    server = await mesh.serve_services([add], telemetry=service)
    stub = DecodeServiceStub(mesh.pool(service).get(server.address))
    async with stream(stub.Decode(decode_pb2.DecodeRequest(request_id="r1"), metadata=[("x-more", "1")])) as call:
        assert len([message async for message in call]) == 1
    spans = await traced.until(2)
    assert [span["attributes"]["kvmesh.request_id"] for span in spans] == ["r1", "r1"]


async def test_a_trace_that_began_elsewhere_goes_on(mesh, traced):
    service = traced.telemetry("service")

    async def handler(request, context):
        return b""

    server = await mesh.serve(telemetry=service, unary_unary=handler)
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    await unary(mesh.call(server, "unary_unary")(metadata=[("traceparent", traceparent)]))
    await unary(mesh.call(server, "unary_unary")(metadata=[("traceparent", "nonsense")]))
    joined, own = await traced.until(2)
    assert joined["trace_id"] == traceparent[3:35]
    assert joined["parent_span_id"] == traceparent[36:52]
    assert own["parent_span_id"] is None


async def test_without_tracing_calls_go_straight_to_grpc(mesh):
    async def handler(request, context):
        return json.dumps([key for key, _ in context.invocation_metadata()]).encode()

    off = telemetry.noop()
    server = await mesh.serve(telemetry=off, unary_unary=handler)
    assert type(mesh.pool(off).get(server.address)) is type(grpc.aio.insecure_channel(server.address))
    assert "traceparent" not in json.loads(await unary(mesh.call(server, "unary_unary", off)()))


async def test_the_calls_of_a_traced_channel_are_those_of_grpc(mesh, traced):
    """No layer of ours between a reader and its messages."""
    service = traced.telemetry("service")

    async def handler(request, context):
        yield request

    server = await mesh.serve(unary_stream=handler)
    async with stream(mesh.call(server, "unary_stream", service)()) as call, grpc.aio.insecure_channel("x:1") as plain:
        assert type(call) is type(plain.unary_stream("/a/b")(b""))


async def test_a_traced_channel_is_a_channel(mesh, traced):
    service = traced.telemetry("service")
    server = await mesh.serve_services(
        [WorkerServicer(WorkerInfo("w", 1, Role.DECODE, "a:1", 1), lambda _: None).service]
    )
    async with mesh.pool(service).get(server.address) as channel:
        await asyncio.wait_for(channel.channel_ready(), 5)
        assert channel.get_state() is not None
