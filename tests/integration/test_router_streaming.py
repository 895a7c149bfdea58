"""What the router carries between workers that stream KV: time left, links, and what became of the chunks."""

from dataclasses import replace

from kvmesh.types import ChunkSource, Readers, Role
from kvmesh.v1 import common_pb2, decode_pb2
from tests.integration.router_fakes import RouterMesh, batch, decoded, prefill_well

LONG = "x" * 600
RATE = 12.5e6


async def decode_over_a_link(request, context):
    fetched = common_pb2.KvFetched(bytes=1000, chunks_by_quality={"transform:2": 3}, link_bytes_per_second=RATE)
    yield decode_pb2.DecodeResponse(started=decode_pb2.DecodeStarted(fetched_tokens=600, fetched=fetched))
    for sample in request.samples:
        yield decoded(batch(sample.index, len(sample.token_ids), 50, request.stopping.max_tokens))


async def test_a_prefill_is_told_how_much_time_is_left_and_a_decode_after_it_is_not():
    async with RouterMesh(ttft_slo=30.0) as mesh:
        prefill, decode = await mesh.add(Role.PREFILL, prefill_well), await mesh.add(Role.DECODE, decode_over_a_link)
        await mesh.generate(LONG)
        assert 0 < prefill.requests[0].ttft_budget_seconds <= 30
        assert not decode.requests[0].HasField("ttft_budget_seconds")
        await mesh.settle()


async def test_without_an_slo_nobody_is_told_of_time():
    async with RouterMesh() as mesh:
        prefill = await mesh.add(Role.PREFILL, prefill_well)
        await mesh.add(Role.DECODE, decode_over_a_link)
        await mesh.generate(LONG)
        assert not prefill.requests[0].HasField("ttft_budget_seconds")
        assert not prefill.requests[0].readers.remote
        await mesh.settle()


async def test_a_decode_that_prefills_itself_is_told_how_much_time_is_left():
    async with RouterMesh(ttft_slo=30.0) as mesh:
        decode = await mesh.add(Role.DECODE, decode_over_a_link)
        await mesh.generate("short")
        assert 0 < decode.requests[0].ttft_budget_seconds <= 30
        await mesh.settle()


async def test_what_was_fetched_is_told_to_the_client():
    async with RouterMesh() as mesh:
        await mesh.add(Role.PREFILL, prefill_well)
        await mesh.add(Role.DECODE, decode_over_a_link)
        usage = (await mesh.generate(LONG)).finish.usage
        assert (usage.fetched_bytes, dict(usage.chunks_by_quality)) == (1000, {"transform:2": 3})
        await mesh.settle()


async def test_what_a_reply_says_of_its_link_is_remembered():
    async with RouterMesh() as mesh:
        await mesh.add(Role.PREFILL, prefill_well)
        decode = await mesh.add(Role.DECODE, decode_over_a_link)
        await mesh.generate(LONG)
        links = mesh.router.flow.peers.links
        assert links.of([ChunkSource("elsewhere", "10.0.0.9:1")]) == Readers(False, 0.0)
        links.retain([replace(decode.info, address="10.0.0.1:1")])
        assert links.of([ChunkSource("elsewhere", "10.0.0.9:1")]) == Readers(True, RATE)
        await mesh.settle()
