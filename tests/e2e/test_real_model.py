"""SmolLM2-135M-Instruct through router, prefill, kvstore and decode as four kinds of process.

The oracle for tokens is the same engine run alone in this process; that engine, in float32, is held against
`transformers` in test_greedy_parity.py.
"""

import asyncio
import json
import signal
from statistics import fmean

import pytest
import pytest_asyncio

from kvmesh import hub
from kvmesh.cli.plan import MeshPlan
from kvmesh.client import Delta, Finish, PromptInfo
from kvmesh.engine.api import EngineRequest, Sample, TokenOutput
from kvmesh.engine.build import build_engine
from kvmesh.engine.linear.native import products
from kvmesh.errors import InvalidArgument
from kvmesh.types import FinishReason, Role, SamplingParams
from kvmesh.v1 import common_pb2, router_pb2, router_pb2_grpc
from tests.e2e.mesh import ProcessMesh, until

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]

MODEL = "smollm2-135m-instruct"
STORY = "The lighthouse keeper counted ships every evening, and wrote each name into a book. " * 24
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def engine():
    return build_engine(hub.resolve(MODEL), blocks=256, threads=1)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def mesh(tmp_path_factory, engine):
    folder = tmp_path_factory.mktemp("real")
    settings = {"KVMESH_TRACE_FILE": str(folder / "spans.jsonl"), "KVMESH_KV_BLOCKS": "256", "KVMESH_LEASE_TTL": "5"}
    plan = MeshPlan(MODEL, prefill=1, decode=2, kvstore=1, port=0, settings=settings)
    async with ProcessMesh.running(plan, folder) as mesh:
        mesh.spans = folder / "spans.jsonl"
        yield mesh


async def collect(mesh, *args, **kwargs):
    """(prompt info, token ids, text, finish) of one sample."""
    info, tokens, text, finish = None, [], "", None
    async with mesh.client.generate(*args, **kwargs) as events:
        async for event in events:
            if isinstance(event, PromptInfo):
                info = event
            elif isinstance(event, Delta):
                tokens += event.token_ids
                text += event.text
                assert event.token_offset == len(tokens)
            elif isinstance(event, Finish):
                finish = event
    return info, tokens, text, finish


def alone(engine, prompt, **sampling):
    engine.add(EngineRequest("alone", tuple(prompt), SamplingParams(**sampling)))
    tokens = []
    while engine.has_work():
        tokens += [event.token_id for event in engine.step() if isinstance(event, TokenOutput)]
    return tokens


async def test_a_question_is_answered_over_kv_that_travelled(mesh):
    _, _, text, finish = await collect(mesh, chat=QUESTION, temperature=0, max_tokens=32)
    assert "Paris" in text
    assert finish.choices[0].reason is FinishReason.STOP
    assert finish.usage.transferred_tokens == finish.usage.prompt_tokens
    assert finish.usage.recomputed_tokens == 0
    assert (finish.prefill_worker, finish.decode_worker[:6]) == ("prefill-0", "decode")
    hops = finish.timings
    assert min(hops.prefill_seconds, hops.transfer_seconds, hops.first_token_seconds, hops.per_token_seconds) > 0


async def test_long_prompts_in_parallel_give_the_tokens_of_one_engine_alone(mesh, engine):
    prompts = [f"{STORY} Number {number}:" for number in range(3)]
    results = await asyncio.gather(
        *(collect(mesh, prompt, temperature=0, max_tokens=24, prompt_token_ids=True) for prompt in prompts)
    )
    for info, tokens, _, finish in results:
        assert info.prompt_tokens > 256
        assert tokens == alone(engine, info.token_ids, temperature=0, max_tokens=24, eos_token_ids=frozenset({2}))
        assert finish.usage.recomputed_tokens == 0


async def test_a_shared_prefix_is_not_computed_again(mesh, engine):
    prompt = f"{STORY} And then"
    first = await collect(mesh, prompt, temperature=0, max_tokens=8, cache_salt="tenant")
    again = await collect(mesh, prompt, temperature=0, max_tokens=8, cache_salt="tenant")
    other = await collect(mesh, prompt, temperature=0, max_tokens=8, cache_salt="another tenant")
    assert first[1] == again[1] == other[1]
    assert first[3].usage.cached_tokens == other[3].usage.cached_tokens == 0
    assert again[3].usage.cached_tokens >= 256


async def test_no_bit_depends_on_what_else_is_served(mesh):
    """Alone, in a crowd, and with its prefix found in the store: the same draws from the same log-probabilities."""
    if products() is None:
        pytest.skip("no native products here")
    prompt, options = f"{STORY} One day", {"temperature": 0.9, "seed": 3, "max_tokens": 24, "logprobs": 2}

    async def outputs(salt):
        return (await mesh.client.complete(prompt, cache_salt=salt, **options)).outputs

    alone = await outputs("a")
    crowd = (mesh.client.complete(f"{STORY[n:]} {n}", temperature=0.9, seed=n, max_tokens=48) for n in range(6))
    in_a_crowd, *_ = await asyncio.gather(outputs("b"), *crowd)
    assert alone == in_a_crowd == await outputs("a")


async def test_a_seed_repeats_samples_and_stop_strings_end_them(mesh):
    options = {"temperature": 0.9, "seed": 11, "max_tokens": 24, "n": 2}
    one = await mesh.client.complete("The three primary colours are", **options)
    two = await mesh.client.complete("The three primary colours are", **options)
    assert [output.token_ids for output in one.outputs] == [output.token_ids for output in two.outputs]
    assert one.outputs[0].token_ids != one.outputs[1].token_ids
    text = one.outputs[0].text
    stop = text[len(text) // 2 :][:3]
    cut = await mesh.client.complete("The three primary colours are", **{**options, "n": 1}, stop=[stop])
    assert cut.text == text[: text.index(stop)]
    assert (cut.finish.choices[0].reason, cut.finish.choices[0].stop) == (FinishReason.STOP, stop)


async def test_logprobs_come_with_alternatives(mesh):
    completion = await mesh.client.complete("One, two, three,", temperature=0, max_tokens=5, logprobs=3)
    for token, position in zip(completion.outputs[0].token_ids, completion.outputs[0].logprobs, strict=True):
        assert position.chosen.token_id == token == position.top[0].token_id
        assert 0 >= position.top[0].logprob >= position.top[1].logprob >= position.top[2].logprob


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_lost_decode_worker_costs_no_token(mesh, engine, number):
    prompt, got = f"{STORY} {number.name}", []
    stream = mesh.client.generate(prompt, temperature=0, max_tokens=64, ignore_eos=True, prompt_token_ids=True)
    async with stream as events:
        async for event in events:
            if isinstance(event, PromptInfo):
                ids = event.token_ids
            elif isinstance(event, Delta):
                got += event.token_ids
                if len(got) >= 8 and number:
                    victim = await mesh.find(Role.DECODE, lambda s: s.running > 0)
                    if victim:
                        mesh.send(victim.worker_id, number)
                        number = None
            elif isinstance(event, Finish):
                finish = event
    assert number is None
    assert finish.recoveries == 1
    assert got == alone(engine, ids, temperature=0, max_tokens=64, ignore_eos=True)
    await mesh.heal()
    await mesh.assert_clean()


async def test_beams_are_searched_where_they_decode(mesh, engine):
    options = {"temperature": 0, "max_tokens": 12, "n": 2, "beam_width": 3}
    completion = await mesh.client.complete("The three primary colours are", **options, prompt_token_ids=True)
    params = SamplingParams(max_tokens=12, n=2, beam_width=3, eos_token_ids=frozenset({2}))
    prompt = tuple(completion.prompt.token_ids)
    engine.add(EngineRequest("beams", prompt, params, (Sample(0), Sample(1))))
    alone = [[], []]
    while engine.has_work():
        for event in engine.step():
            if isinstance(event, TokenOutput):
                alone[event.index].append(event.token_id)
    assert [list(output.token_ids) for output in completion.outputs] == alone


async def test_best_of_gives_out_the_likeliest(mesh):
    options = {"temperature": 1.0, "seed": 5, "max_tokens": 12}
    every = await mesh.client.complete("My favourite animal is", **options, n=4, logprobs=0)
    means = [fmean(entry.chosen.logprob for entry in output.logprobs) for output in every.outputs]
    best = await mesh.client.complete("My favourite animal is", **options, best_of=4)
    assert [output.token_ids for output in best.outputs] == [every.outputs[means.index(max(means))].token_ids]
    assert not best.outputs[0].logprobs


async def test_structured_output_survives_the_worker(mesh):
    schema = json.dumps({"type": "array", "items": {"type": "integer"}, "minItems": 12, "maxItems": 12})
    text, killed = "", False
    async with mesh.client.generate(chat=QUESTION, temperature=0.8, seed=3, json_schema=schema) as events:
        async for event in events:
            if isinstance(event, Delta):
                text += event.text
                victim = None if killed else await mesh.find(Role.DECODE, lambda s: s.running > 0)
                if victim and len(text) > 6:
                    mesh.send(victim.worker_id, signal.SIGKILL)
                    killed = True
            elif isinstance(event, Finish):
                finish = event
    numbers = json.loads(text)
    assert len(numbers) == 12
    assert all(isinstance(number, int) for number in numbers)
    assert finish.choices[0].reason is FinishReason.STOP
    assert (killed, finish.recoveries) == (True, 1)
    await mesh.heal()
    with pytest.raises(InvalidArgument, match="json_schema"):
        await mesh.client.complete("x", json_schema='{"type": "nope"}')
    await mesh.assert_clean()


async def test_one_trace_has_a_span_for_each_of_the_five_edges(mesh):
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    stub = router_pb2_grpc.InferenceServiceStub(mesh.client._channels.get(mesh.router.address))
    request = router_pb2.GenerateStreamRequest(
        text=f"{STORY} traced", stopping=common_pb2.StoppingParameters(max_tokens=4)
    )
    async for _ in stub.GenerateStream(request, metadata=(("traceparent", f"00-{trace_id}-b7ad6b7169203331-01"),)):
        pass
    edges = {
        ("", "router", "GenerateStream"),
        ("router", "prefill", "Prefill"),
        ("prefill", "kvstore", "PutChunks"),
        ("router", "decode", "Decode"),
        ("decode", "kvstore", "GetChunks"),
    }

    def seen():
        return _edges(mesh.spans, trace_id)

    await until(lambda: asyncio.sleep(0, edges <= seen()), 10, lambda: str(seen()))


def _edges(path, trace_id):
    """(calling service, serving service, method) of every server span of the trace."""
    spans = [json.loads(line) for line in path.read_text().splitlines()]
    spans = {span["span_id"]: span for span in spans if span["trace_id"] == trace_id}
    served = [span for span in spans.values() if span["kind"].upper().endswith("SERVER")]
    return {
        (_service(spans.get(span["parent_span_id"])), _service(span), span["name"].rpartition("/")[2])
        for span in served
    }


def _service(span):
    return span["service"] if span else ""
