"""Batching, chunking, prefix reuse, forks, imports and preemption change no token.

The oracle is the same fake model run alone, one request at a time, in a pool that never fills. Its tokens depend on
every KV entry of the context, so a wrong table, copy or import shows.
"""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.engine.api import Admitted, EngineRequest, KvReady, Sample, TokenOutput
from kvmesh.engine.fake import fake_engine
from kvmesh.errors import AlreadyExists, InvalidArgument, Overloaded
from kvmesh.types import FinishReason, SamplingParams


def drain(engine, *, on_event=lambda event: None, limit=5000):
    """Steps until there is nothing to do; tokens by (request, sample)."""
    tokens = {}
    for _ in range(limit):
        if not engine.has_work():
            return tokens
        for event in engine.step():
            on_event(event)
            if isinstance(event, TokenOutput):
                stream = tokens.setdefault((event.request_id, event.index), [])
                assert event.offset == len(stream) or event.offset > 0
                stream.append(event.token_id)
        assert engine.check_integrity() == []
    raise AssertionError("the engine makes no progress")


def alone(request):
    """Each sample of the request, by an undisturbed engine."""
    engine = fake_engine(blocks=512)
    fresh = replace(request, request_id="alone", load_kv=False, samples=tuple(Sample(s.index) for s in request.samples))
    engine.add(fresh)
    return {index: tuple(stream) for (_, index), stream in drain(engine).items()}


def params(max_tokens=8, **kwargs):
    return SamplingParams(max_tokens=max_tokens, temperature=1.0, seed=7, **kwargs)


prompts = st.builds(
    lambda shared, own: tuple([1] * shared + own),
    st.sampled_from([0, 5, 16, 32, 40]),
    st.lists(st.integers(0, 255), min_size=1, max_size=40),
)
requests = st.lists(st.tuples(prompts, st.integers(1, 24), st.integers(1, 3)), min_size=1, max_size=7)


@settings(max_examples=120, deadline=None)
@given(
    requests,
    st.integers(8, 40),
    st.sampled_from([1, 7, 16, 33, 512]),
    st.integers(3, 16),
    st.lists(st.integers(0, 6), max_size=2),
)
def test_no_token_depends_on_company(specs, blocks, budget, max_running, aborted):
    engine = fake_engine(blocks=blocks, token_budget=budget, max_running=max_running)
    work = []
    for number, (prompt, max_tokens, n) in enumerate(specs):
        request = EngineRequest(f"r{number}", prompt, params(max_tokens), tuple(Sample(i) for i in range(n)))
        engine.add(request)
        work.append(request)
    for number in aborted:
        assert engine.abort(f"r{number}") == any(request.request_id == f"r{number}" for request in work)
        work = [request for request in work if request.request_id != f"r{number}"]
        assert engine.abort(f"r{number}") is False
    got = drain(engine)
    for request in work:
        room = min(request.sampling.max_tokens, blocks * 16 - len(request.prompt))
        for index, stream in alone(request).items():
            assert tuple(got.pop((request.request_id, index))) == stream[:room]
    assert got == {}
    assert engine.statistics().blocks_used == 0
    assert engine.scheduler.groups == {}


@settings(max_examples=150, deadline=None)
@given(
    prompts,
    st.integers(1, 3),
    st.integers(0, 10),
    st.integers(0, 90),
    st.sampled_from([5, 16, 512]),
    st.integers(8, 20),
)
def test_prefill_then_decode_elsewhere_continues_the_same(prompt, n, extra, loaded, budget, blocks):
    """KV leaves one engine, enters another, in part; the rest is recomputed there."""
    want = EngineRequest("r", prompt, params(12), tuple(Sample(i) for i in range(n)))
    expected = alone(want)
    prefill, exported = fake_engine(blocks=64, token_budget=budget), []
    prefill.add(replace(want, prefill_only=True, load_kv=True))
    assert prefill.step() == [Admitted("r", 0)]
    ranges = [(start, min(start + 32, len(prompt))) for start in range(0, len(prompt), 32)]
    prefill.start("r", 0, ranges)
    first = drain(prefill, on_event=lambda e: exported.append(e) if isinstance(e, KvReady) else None)
    assert {index: stream[:1] for index, stream in expected.items()} == {i: tuple(t) for (_, i), t in first.items()}
    assert [(kv.start, kv.start + kv.data.shape[2]) for kv in exported] == ranges
    assert prefill.scheduler.groups == {}

    decode = fake_engine(blocks=blocks, token_budget=budget)
    decode.add(EngineRequest("company", (1, 2, 3), params(120)))
    had = min(1 + extra, 11)
    decode.add(replace(want, load_kv=True, samples=tuple(Sample(i, expected[i][:had]) for i in range(n))))
    while "r" not in decode.scheduler.loading:
        decode.step()
    for kv in exported:
        decode.import_kv("r", kv.start, kv.data)
    decode.start("r", min(loaded, len(prompt)))
    decode.add(EngineRequest("young", (5,), params(80)))
    rest = drain(decode)
    for company in ("company", "young"):
        rest.pop((company, 0))
    assert {index: stream[had:] for index, stream in expected.items()} == {i: tuple(t) for (_, i), t in rest.items()}
    assert decode.statistics().blocks_used == 0


def test_a_full_import_computes_nothing_of_the_prompt():
    prompt = tuple(range(100))
    source, exported = fake_engine(), []
    source.add(EngineRequest("r", prompt, params(), prefill_only=True, load_kv=True))
    source.step()
    source.start("r", 0, [(0, 100)])
    drain(source, on_event=lambda e: exported.append(e) if isinstance(e, KvReady) else None)
    target = fake_engine()
    target.add(EngineRequest("r", prompt, params(), (Sample(0, (65,)),), load_kv=True))
    target.step()
    target.import_kv("r", 0, exported[0].data)
    target.start("r", 100)
    iteration = target.scheduler.schedule()
    assert [(row.start, list(row.token_ids)) for row in iteration.rows] == [(100, [65])]


def test_prefixes_are_shared_and_salted():
    engine = fake_engine()
    shared = tuple(range(64))
    for name, root in (("a", b"x"), ("b", b"x"), ("c", b"other tenant")):
        engine.add(EngineRequest(name, (*shared, 9), params(1), root=root))
        hits = engine.statistics().hits_total
        drain(engine)
        assert engine.statistics().hits_total - hits == (64 if name == "b" else 0)


def test_samples_share_the_prompt_and_copy_on_write():
    engine = fake_engine()
    engine.add(EngineRequest("r", tuple(range(40)), params(4), tuple(Sample(i) for i in range(3))))
    engine.step()
    assert engine.statistics().blocks_used == 3
    iteration = engine.scheduler.schedule()
    assert len(iteration.copies) == 2
    assert len({tuple(row.block_ids[:2]) for row in iteration.rows}) == 1
    assert len({row.block_ids[2] for row in iteration.rows}) == 3


def test_preemption_happens_and_is_counted():
    engine = fake_engine(blocks=6)
    for name in "abc":
        engine.add(EngineRequest(name, (1, 2, 3), params(40)))
    drain(engine)
    assert engine.statistics().preemptions_total > 0


def test_decodes_come_before_prompt_chunks_within_the_budget():
    engine = fake_engine(token_budget=20)
    engine.add(EngineRequest("decode", (1, 2, 3), params(50)))
    engine.step()
    engine.add(EngineRequest("prompt", tuple(range(100)), params(1)))
    iteration = engine.scheduler.schedule()
    assert [len(row.token_ids) for row in iteration.rows] == [1, 19]


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_the_end_of_sequence_token_ends_a_sample_unless_ignored(ignore_eos):
    engine = fake_engine(eos_period=4)
    sampling = params(64, ignore_eos=ignore_eos, eos_token_ids=frozenset({257}), min_tokens=5)
    engine.add(EngineRequest("r", (1, 2, 3), sampling))
    outputs = []
    drain(engine, on_event=lambda e: outputs.append(e) if isinstance(e, TokenOutput) else None)
    last = outputs[-1]
    assert last.last
    assert len(outputs) >= 6
    if ignore_eos:
        assert (last.finish_reason, last.matched_stop_token, len(outputs)) == (FinishReason.LENGTH, None, 64)
    else:
        assert (last.finish_reason, last.matched_stop_token) == (FinishReason.STOP, 257)
        assert not any(output.last for output in outputs[:-1])


def test_the_context_ends_a_sample():
    engine = fake_engine(max_model_len=32)
    engine.add(EngineRequest("r", tuple(range(30)), params(500)))
    assert len(drain(engine)["r", 0]) == 2


def test_bad_requests_are_refused_and_leave_nothing():
    engine = fake_engine(blocks=2, max_waiting=1, max_running=2)
    with pytest.raises(InvalidArgument, match="empty"):
        engine.add(EngineRequest("r", (), params()))
    with pytest.raises(InvalidArgument, match="context of 32"):
        engine.add(EngineRequest("r", tuple(range(32)), params()))
    with pytest.raises(Overloaded, match="3 samples"):
        engine.add(EngineRequest("r", (1,), params(), tuple(Sample(i) for i in range(3))))
    engine.add(EngineRequest("r", (1,), params()))
    with pytest.raises(AlreadyExists):
        engine.add(EngineRequest("r", (1,), params()))
    with pytest.raises(Overloaded, match="waiting"):
        engine.add(EngineRequest("s", (1,), params()))
    assert list(drain(engine)) == [("r", 0)]


def test_malformed_kv_is_refused():
    engine = fake_engine()
    engine.add(EngineRequest("r", (1, 2, 3), params(), load_kv=True))
    engine.step()
    good = engine.runner.read_kv([0], 0, 3)
    engine.import_kv("gone", 0, good)
    for start, data in ((1, good), (-1, good), (0, good[:1]), (0, good.astype("float64")), (0, good[0])):
        with pytest.raises(InvalidArgument):
            engine.import_kv("r", start, data)


def test_a_runner_that_fails_costs_only_its_batch():
    engine = fake_engine(max_running=1)
    engine.add(EngineRequest("bad", (1, 2, 3), params()))
    engine.add(EngineRequest("good", (1, 2, 3), params()))
    run, calls = engine.runner.run, []

    class Once:
        def __getattr__(self, name):
            return getattr(runner, name)

        def run(self, batch):
            calls.append(batch)
            if len(calls) == 1:
                raise RuntimeError("out of luck")
            return run(batch)

    runner, engine.runner = engine.runner, Once()
    events = engine.step()
    assert [type(event).__name__ for event in events] == ["Admitted", "Computing", "Failed"]
    assert len(drain(engine)["good", 0]) == 8
    assert engine.statistics().blocks_used == 0


def test_who_already_runs_in_this_iteration_is_not_preempted():
    """A resumed sample outgrows the pool while a younger request has its row in the same iteration."""
    prompt, sampling = tuple(range(24)), params(70)
    expected = alone(EngineRequest("r", prompt, sampling, tuple(Sample(i) for i in range(3))))
    engine = fake_engine(blocks=7, token_budget=1)
    engine.add(EngineRequest("r", prompt, sampling, tuple(Sample(i, expected[i][:60]) for i in range(3))))
    while not engine.scheduler.groups["r"].sequences[0].samples[0].output or len(engine.scheduler.running) < 3:
        engine.step()
    engine.add(EngineRequest("young", (5,), params(70)))
    got = drain(engine)
    assert {i: tuple(got["r", i]) for i in range(3)} == {i: stream[60:] for i, stream in expected.items()}
    assert tuple(got["young", 0]) == alone(EngineRequest("young", (5,), params(70)))[0]
