"""The router's flow over real gRPC with scripted workers: placement, failover, recovery, and nothing left behind."""

import grpc
import pytest

from kvmesh.types import Role
from kvmesh.v1 import common_pb2, router_pb2
from tests.integration.router_fakes import (
    ANSWER,
    EOS,
    RouterMesh,
    answer,
    batch,
    decode_until,
    decode_well,
    decoded,
    die,
    first_tokens,
    freeze,
    prefill_well,
    refuse,
)

LONG = "x" * 600


def options(**stopping):
    return {"stopping": common_pb2.StoppingParameters(**stopping)}


@pytest.fixture
async def mesh():
    async with RouterMesh() as mesh:
        yield mesh
        await mesh.settle()


async def test_tells_the_whole_story(mesh):
    prefill, decode = await mesh.add(Role.PREFILL, prefill_well), await mesh.add(Role.DECODE, decode_well)
    got = await mesh.generate(
        LONG, request_id="r1", cache_salt="tenant", sampling=common_pb2.SamplingParameters(temperature=0, seed=7)
    )
    assert (got.text, got.tokens[0], got.reason()) == (ANSWER, answer(0), "STOP")
    assert (got.prompt.request_id, got.prompt.model, got.prompt.prompt_tokens, got.prompt.seed) == (
        "r1",
        "fake",
        600,
        7,
    )
    choice, finish = got.finish.choices[0], got.finish
    assert (choice.stop_token_id, choice.completion_tokens) == (EOS, len(ANSWER) + 1)
    assert (finish.prefill_worker, finish.decode_worker, finish.recoveries) == ("prefill-0", "decode-0", 0)
    assert (finish.usage.prompt_tokens, finish.usage.completion_tokens) == (600, len(ANSWER) + 1)
    assert finish.usage.transferred_tokens == 7
    assert (finish.timings.prefill_queue_seconds, finish.timings.prefill_seconds) == (0.25, 0.5)
    assert finish.timings.decode_queue_seconds == 0.125
    assert 0 < finish.timings.first_token_seconds <= finish.timings.total_seconds
    sent, handed = prefill.requests[0], decode.requests[0]
    assert [chunk.tokens for chunk in sent.ticket.chunks] == [256, 256, 88]
    assert handed.ticket == sent.ticket
    assert sent.request_id != handed.request_id
    assert (sent.cache_salt, sent.sampling.seed, sent.sampling.temperature) == ("tenant", 7, 0)
    assert sent.stopping.max_tokens == 4096 - 600
    assert list(handed.samples[0].token_ids) == answer(0)[:1]
    assert prefill.released == mesh.store.released == []


async def test_three_samples_end_each_in_its_own_way(mesh):
    await mesh.add(Role.PREFILL, prefill_well)
    decode = await mesh.add(Role.DECODE, decode_well)
    got = await mesh.generate(sampling=common_pb2.SamplingParameters(n=3), **options(stop=["fox"]))
    assert [got.texts[i] for i in range(3)] == [ANSWER[i:].partition("brown")[0] + "brown " for i in range(3)]
    assert [choice.stop for choice in got.finish.choices] == ["fox"] * 3
    assert got.finish.usage.completion_tokens == sum(map(len, got.tokens.values()))
    await mesh.settle()
    assert decode.running == 0


async def test_stop_string_across_messages_cuts_tokens_too(mesh):
    await mesh.add(Role.DECODE, decode_until(per_message=8))
    got = await mesh.generate(**options(stop=["quick"]))
    assert got.text == "The "
    assert got.tokens[0] == list(b"The quick")
    assert got.finish.choices[0].stop == "quick"


async def test_one_token_never_reaches_decode_and_the_lease_is_released(mesh):
    prefill, decode = await mesh.add(Role.PREFILL, prefill_well), await mesh.add(Role.DECODE, decode_well)
    got = await mesh.generate(**options(max_tokens=1))
    assert (got.text, got.reason()) == ("T", "LENGTH")
    await mesh.settle()
    assert decode.requests == []
    assert prefill.released == [prefill.requests[0].ticket.lease_id]


@pytest.mark.parametrize("missing", ["prefill", "store"])
async def test_without_prefill_or_store_decode_does_it_all(missing):
    async with RouterMesh() as mesh:
        if missing == "store":
            mesh.directory.set([])
            await mesh.add(Role.PREFILL, die)
        decode = await mesh.add(Role.DECODE, decode_well)
        got = await mesh.generate()
        assert (got.text, got.finish.prefill_worker, got.finish.recoveries) == (ANSWER, "", 0)
        assert not decode.requests[0].HasField("ticket")
        await mesh.settle()


@pytest.mark.parametrize(
    ("failure", "recoveries"),
    [(die, 1), (freeze, 1), (refuse(grpc.StatusCode.INTERNAL), 1), (refuse(grpc.StatusCode.FAILED_PRECONDITION), 0),
     (refuse(grpc.StatusCode.RESOURCE_EXHAUSTED), 0)],
    ids=["dies", "freezes", "internal", "mismatch", "busy"],
)  # fmt: skip
async def test_a_failing_prefill_is_left_for_another(mesh, failure, recoveries):
    bad, good = await mesh.add(Role.PREFILL, failure), await mesh.add(Role.PREFILL, prefill_well)
    await mesh.add(Role.DECODE, decode_well)
    got = await mesh.generate()
    assert (got.text, got.finish.prefill_worker, got.finish.recoveries) == (ANSWER, "prefill-1", recoveries)
    await mesh.settle()
    assert bad.released == [bad.requests[0].ticket.lease_id]
    assert good.released == []
    assert good.requests[0].ticket.lease_id != bad.requests[0].ticket.lease_id


async def test_when_every_prefill_fails_decode_does_it_all(mesh):
    for _ in range(2):
        await mesh.add(Role.PREFILL, die)
    decode = await mesh.add(Role.DECODE, decode_well)
    got = await mesh.generate()
    assert got.text == ANSWER
    assert not decode.requests[0].HasField("ticket")


async def test_prefill_lost_while_publishing_is_not_repeated(mesh):
    async def half(request, context):
        yield first_tokens(request)
        async for message in die(request, context):
            yield message

    await mesh.add(Role.PREFILL, half)
    decode = await mesh.add(Role.DECODE, decode_well)
    got = await mesh.generate(LONG)
    assert (got.text, got.finish.recoveries) == (ANSWER, 1)
    assert len(decode.requests[0].ticket.chunks) == 3


async def test_invalid_argument_of_a_worker_is_not_retried(mesh):
    await mesh.add(Role.PREFILL, refuse(grpc.StatusCode.INVALID_ARGUMENT, "too long for me"))
    other = await mesh.add(Role.PREFILL, prefill_well)
    await mesh.add(Role.DECODE, decode_well)
    with pytest.raises(grpc.aio.AioRpcError, match="too long for me") as caught:
        await mesh.generate()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert other.requests == []


@pytest.mark.parametrize(
    "failure", [die, freeze, refuse(grpc.StatusCode.INTERNAL)], ids=["dies", "freezes", "internal"]
)
@pytest.mark.parametrize("after", [0, 1, 13])
async def test_recovers_in_mid_stream(mesh, failure, after):
    prefill = await mesh.add(Role.PREFILL, prefill_well)
    bad, good = await mesh.add(Role.DECODE, decode_until(after, failure)), await mesh.add(Role.DECODE, decode_well)
    got = await mesh.generate(LONG, sampling=common_pb2.SamplingParameters(n=2, seed=3))
    assert [got.texts[i] for i in range(2)] == [ANSWER, ANSWER[1:]]
    assert (got.finish.recoveries, got.finish.decode_worker) == (1, "decode-1")
    before, now = bad.requests[0].ticket, good.requests[0].ticket
    assert [chunk.tokens for chunk in now.chunks] == [256, 256]
    assert now.lease_id != before.lease_id
    assert good.requests[0].sampling.seed == 3
    await mesh.settle()
    assert prefill.released == mesh.store.released == []


async def test_a_decode_refused_before_it_started_leaves_the_whole_ticket_to_the_next(mesh):
    await mesh.add(Role.PREFILL, prefill_well)
    bad, good = await mesh.add(Role.DECODE, die), await mesh.add(Role.DECODE, decode_well)
    assert (await mesh.generate(LONG)).text == ANSWER
    assert good.requests[0].ticket == bad.requests[0].ticket


async def test_a_stream_that_ends_early_or_repeats_or_skips_costs_nothing(mesh):
    async def ends_early(request, context):
        yield decoded(batch(0, len(request.samples[0].token_ids), 2, 99))

    async def repeats_then_skips(request, context):
        have = len(request.samples[0].token_ids)
        yield decoded(batch(0, 0, have + 2, 99))
        yield decoded(batch(0, 1, have + 3, 99), batch(0, 0, 2, 99))
        yield decoded(batch(0, have + 20, 2, 99))

    for script in (ends_early, repeats_then_skips, decode_well):
        await mesh.add(Role.DECODE, script)
    got = await mesh.generate()
    assert (got.text, got.tokens[0], got.finish.recoveries) == (ANSWER, answer(0), 2)


async def test_the_last_worker_is_tried_once_more_after_waiting(mesh):
    scripts = iter([decode_until(4), decode_well])

    async def comes_back(request, context):
        async for message in next(scripts)(request, context):
            yield message

    await mesh.add(Role.DECODE, comes_back)
    got = await mesh.generate()
    assert (got.text, got.finish.recoveries) == (ANSWER, 1)


async def test_mismatched_layouts_are_refused_with_the_difference(mesh):
    await mesh.add(Role.PREFILL, prefill_well, layout={"model": "fake", "dtype": "float16"})
    await mesh.add(Role.DECODE, decode_well)
    with pytest.raises(grpc.aio.AioRpcError, match=r"dtype \(float16, float32\)") as caught:
        await mesh.generate()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await mesh.add(Role.PREFILL, prefill_well)
    assert (await mesh.generate()).finish.prefill_worker == "prefill-1"


async def test_generate_gives_the_same_in_one_reply(mesh):
    await mesh.add(Role.PREFILL, prefill_well)
    await mesh.add(Role.DECODE, decode_well)
    reply = await mesh.inference.Generate(
        router_pb2.GenerateRequest(
            chat=router_pb2.ChatMessages(messages=[router_pb2.ChatMessage(role="user", content="Hi")]),
            sampling=common_pb2.SamplingParameters(n=2),
            response=router_pb2.ResponseOptions(prompt_token_ids=True),
        ),
        timeout=20,
    )
    assert [completion.text for completion in reply.completions] == [ANSWER, ANSWER[1:]]
    assert bytes(reply.prompt.token_ids) == b"user: Hi\nassistant: "
    assert len(reply.finish.choices) == 2


async def test_says_what_the_mesh_is(mesh):
    await mesh.add(Role.PREFILL, prefill_well)
    await mesh.add(Role.DECODE, decode_well)
    model = (await mesh.inference.GetModelInfo(router_pb2.GetModelInfoRequest())).models[0]
    assert (model.name, model.vocabulary_size, model.max_model_len) == ("fake", 512, 4096)
    assert (model.prefill_workers, model.decode_workers, model.has_chat_template) == (1, 1, True)
    dead = mesh.directory.workers(Role.DECODE)[0]
    mesh.directory.set([*mesh.directory.workers(), dead.__class__("lost", 1, Role.DECODE, "127.0.0.1:1", 1, "fake")])
    status = await mesh.operator.GetMeshStatus(router_pb2.GetMeshStatusRequest(check_integrity=True), timeout=10)
    assert [worker.info.worker_id for worker in status.workers] == [
        mesh.router.info.worker_id, "kvstore-0", "prefill-0", "decode-0", "lost",
    ]  # fmt: skip
    assert [bool(worker.error) for worker in status.workers] == [False, False, False, False, True]
    assert status.workers[0].statistics.integrity_errors == []
