"""Bad input: everything wrong is named together; good input gets its defaults."""

import pytest

from kvmesh.errors import InvalidArgument
from kvmesh.types import Role, WorkerCapacity, WorkerInfo
from kvmesh.v1 import common_pb2, router_pb2
from kvmesh_router.chat_template import ChatTemplate
from kvmesh_router.model import Model, context_of, load
from kvmesh_router.tokenizer import Tokenizer
from kvmesh_router.validation import read_submission, validate

FAKE = load("fake")


async def validated(context=100, model=FAKE, **fields):
    return await validate(read_submission(router_pb2.GenerateStreamRequest(**fields)), model, context)


async def violations(**fields):
    with pytest.raises(InvalidArgument) as caught:
        await validated(**fields)
    return dict(caught.value.violations)


async def test_defaults():
    request = await validated(text="Hello")
    assert request.prompt == tuple(b"Hello")
    assert (request.sampling.max_tokens, request.sampling.temperature, request.sampling.n) == (95, 1.0, 1)
    assert request.sampling.eos_token_ids == {257}
    assert request.response.text
    assert request.request_id
    assert request.sampling.logprobs is None


async def test_seed_is_kept_or_chosen():
    kept = await validated(text="x", sampling=common_pb2.SamplingParameters(seed=0))
    assert kept.sampling.seed == 0
    assert len({(await validated(text="x")).sampling.seed for _ in range(8)}) > 1


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "input"),
        ({"text": ""}, "prompt"),
        ({"token_ids": router_pb2.TokenIds()}, "prompt"),
        ({"chat": router_pb2.ChatMessages()}, "chat"),
        ({"text": "x" * 100}, "prompt"),
        ({"token_ids": router_pb2.TokenIds(ids=[1, 512])}, "token_ids"),
        ({"text": "x", "stopping": common_pb2.StoppingParameters(max_tokens=100)}, "max_tokens"),
        ({"text": "x", "stopping": common_pb2.StoppingParameters(max_tokens=2**32 - 1)}, "max_tokens"),
        ({"text": "x", "stopping": common_pb2.StoppingParameters(stop=["a"] * 17)}, "stop"),
        ({"text": "x", "stopping": common_pb2.StoppingParameters(stop=["a" * 1025])}, "stop"),
        ({"text": "x", "sampling": common_pb2.SamplingParameters(temperature=float("inf"))}, "temperature"),
        ({"text": "x", "sampling": common_pb2.SamplingParameters(logit_bias={900: 1.0})}, "logit_bias"),
        ({"text": "x", "response": router_pb2.ResponseOptions(logprobs=21)}, "logprobs"),
        ({"text": "x", "request_id": "r" * 257}, "request_id"),
    ],
)
async def test_one_violation(fields, field):
    assert list(await violations(**fields)) == [field]


async def test_all_violations_together():
    found = await violations(
        text="x" * 200,
        sampling=common_pb2.SamplingParameters(temperature=-1, top_p=float("nan"), min_p=2, n=65, presence_penalty=3),
        stopping=common_pb2.StoppingParameters(stop=[""], min_tokens=9, max_tokens=3),
    )
    assert found.keys() == {"prompt", "temperature", "top_p", "min_p", "n", "presence_penalty", "stop", "min_tokens"}


async def test_the_longest_that_fits():
    assert (await validated(text="x" * 99)).sampling.max_tokens == 1
    fits = await validated(text="x" * 40, stopping=common_pb2.StoppingParameters(max_tokens=60))
    assert fits.sampling.max_tokens == 60
    assert (
        "context of 100"
        in (await violations(text="x" * 40, stopping=common_pb2.StoppingParameters(max_tokens=61)))["max_tokens"]
    )


async def test_chat_is_refused_by_the_template_or_for_want_of_one():
    chat = router_pb2.ChatMessages(messages=[router_pb2.ChatMessage(role="user", content="Hi")])
    picky = Tokenizer(FAKE.tokenizer._backend, ChatTemplate("{{ raise_exception('only system here') }}", {}))
    for tokenizer, reason in ((Tokenizer(FAKE.tokenizer._backend), "no chat template"), (picky, "only system here")):
        model = Model("m", tokenizer, 512, frozenset(), 100)
        with pytest.raises(InvalidArgument, match=reason):
            await validated(model=model, chat=chat)


async def test_the_model_names_its_own_default_only():
    assert read_submission(router_pb2.GenerateStreamRequest()).model is None
    assert read_submission(router_pb2.GenerateRequest(model="fake")).model == "fake"


def test_context_is_what_every_worker_holds():
    sizes = [("fake", 50), ("fake", 0), ("fake", 80), ("other", 5)]
    workers = [
        WorkerInfo(f"w{i}", 1, Role.DECODE, "h:1", 1, name, capacity=WorkerCapacity(max_model_len=size))
        for i, (name, size) in enumerate(sizes)
    ]
    assert context_of(FAKE, workers) == 50
    assert context_of(FAKE, []) == FAKE.max_model_len
