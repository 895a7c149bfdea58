"""Domain -> proto -> bytes -> proto -> domain is the identity."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.errors import InvalidArgument
from kvmesh.rpc import convert
from kvmesh.types import (
    ChunkRef,
    ChunkSource,
    FinishReason,
    KvTicket,
    PositionLogprobs,
    Role,
    SamplingParams,
    TierCounts,
    TokenBatch,
    TokenLogprob,
    WorkerCapacity,
    WorkerInfo,
    WorkerStatistics,
)
from kvmesh.v1 import common_pb2 as pb

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
real = st.floats(allow_nan=False)
text = st.text(max_size=20)
name = st.text(min_size=1, max_size=20)
logprob = st.builds(TokenLogprob, u32, real)
position = st.builds(PositionLogprobs, logprob, st.lists(logprob, max_size=3).map(tuple))
batches = st.builds(
    TokenBatch,
    u32,
    u32,
    st.lists(u32, max_size=5).map(tuple),
    st.lists(position, max_size=3).map(tuple),
    st.none() | st.sampled_from(FinishReason),
    st.none() | u32,
)
params = st.builds(
    SamplingParams,
    max_tokens=u32,
    temperature=real,
    top_p=real,
    top_k=u32,
    min_p=real,
    repetition_penalty=real,
    presence_penalty=real,
    frequency_penalty=real,
    logit_bias=st.dictionaries(u32, real, max_size=4),
    seed=u64,
    n=u32,
    logprobs=st.none() | st.integers(0, 20),
    min_tokens=u32,
    ignore_eos=st.booleans(),
    stop_token_ids=st.frozensets(u32, max_size=4),
    eos_token_ids=st.frozensets(u32, max_size=4),
)
sources = st.lists(st.builds(ChunkSource, text, text), min_size=3, max_size=3).map(tuple)
chunks = st.lists(
    st.builds(ChunkRef, st.binary(min_size=32, max_size=32), u32, u32, u32, u32, st.integers(0, 2)), max_size=4
).map(tuple)
tickets = st.builds(KvTicket, text, text, u32, chunks, sources, st.integers(1, 16), st.sampled_from([b"", b"t" * 16]))
capacities = st.builds(WorkerCapacity, *[u32] * 6, u64, u64)
infos = st.builds(
    WorkerInfo,
    name,
    u64,
    st.sampled_from(Role),
    name,
    u32,
    text,
    text,
    st.dictionaries(text, text, max_size=3),
    capacities,
    real,
    text,
)
readings = st.builds(
    WorkerStatistics,
    *[u32] * 6,
    *[u64] * 8,
    real,
    st.booleans(),
    st.lists(text, max_size=3),
    missed_replicas_total=u64,
    tiers=st.dictionaries(text, st.builds(TierCounts, *[u64] * 6), max_size=3),
)


def over_the_wire(message):
    return type(message).FromString(message.SerializeToString())


@given(batches)
def test_token_batches(batch):
    assert convert.token_batch_from_proto(over_the_wire(convert.token_batch_to_proto(batch))) == batch


@given(params)
def test_sampling(params):
    sampling, stopping = map(over_the_wire, convert.sampling_to_proto(params))
    assert convert.sampling_from_proto(sampling, stopping, params.logprobs, params.eos_token_ids, 0) == params


@given(tickets)
def test_tickets(ticket):
    assert convert.ticket_from_proto(over_the_wire(convert.ticket_to_proto(ticket))) == ticket


@given(infos)
def test_worker_infos(info):
    assert convert.worker_info_from_proto(over_the_wire(convert.worker_info_to_proto(info))) == info


@given(readings)
def test_statistics(statistics):
    assert convert.statistics_from_proto(over_the_wire(convert.statistics_to_proto(statistics))) == statistics


@pytest.mark.parametrize(
    ("message", "kind"), [(pb.WorkerStatistics, WorkerStatistics), (pb.WorkerCapacity, WorkerCapacity)]
)
def test_no_field_is_forgotten(message, kind):
    assert {field.name for field in message.DESCRIPTOR.fields} == set(kind.__dataclass_fields__)


def test_what_is_not_set_has_the_defaults_of_the_contract():
    params = convert.sampling_from_proto(pb.SamplingParameters(), pb.StoppingParameters(), None, [2], 100)
    assert params == SamplingParams(max_tokens=100, eos_token_ids=frozenset([2]))


def test_zero_is_not_unset():
    sampling = pb.SamplingParameters(temperature=0, top_p=0, repetition_penalty=0, n=0)
    params = convert.sampling_from_proto(sampling, pb.StoppingParameters(max_tokens=0), 0, [], 100)
    assert (params.temperature, params.top_p, params.repetition_penalty, params.n) == (0, 0, 0, 0)
    assert (params.max_tokens, params.logprobs) == (0, 0)
    assert {name for name, _ in params.problems(10)} == {"top_p", "repetition_penalty", "n", "max_tokens"}


@pytest.mark.parametrize(
    "ticket",
    [
        pb.KvTicket(chunks=[pb.ChunkRef(key=b"short", tokens=1)], sources=[pb.ChunkSource()]),
        pb.KvTicket(chunks=[pb.ChunkRef(key=bytes(32), tokens=1, source=1)], sources=[pb.ChunkSource()]),
        pb.KvTicket(tenant=b"mine"),
    ],
)
def test_a_ticket_that_makes_no_sense_is_refused(ticket):
    with pytest.raises(InvalidArgument, match=r"ticket\.(chunks|tenant)"):
        convert.ticket_from_proto(ticket)


@pytest.mark.parametrize(
    "info",
    [
        pb.WorkerInfo(),
        pb.WorkerInfo(worker_id="w", address="a:1"),
        pb.WorkerInfo(worker_id="w", role=pb.WORKER_ROLE_DECODE),
        pb.WorkerInfo(address="a:1", role=pb.WORKER_ROLE_DECODE),
        pb.WorkerInfo(worker_id="w", address="a:1", role=99),
    ],
)
def test_a_worker_that_makes_no_sense_is_refused(info):
    with pytest.raises(InvalidArgument):
        convert.worker_info_from_proto(info)


def test_an_unknown_finish_reason_is_refused():
    with pytest.raises(InvalidArgument, match="99"):
        convert.finish_reason_from_proto(99)
