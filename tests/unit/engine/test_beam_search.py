"""Beam search in the engine against `transformers`, alone, beside others, and in a pool that is too small for all."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.engine.api import EngineRequest, Failed, Sample, TokenOutput
from kvmesh.engine.beam import BeamSearch
from kvmesh.engine.core import EngineCore
from kvmesh.engine.loading import load
from kvmesh.engine.runner import TorchRunner
from kvmesh.errors import InvalidArgument, Overloaded
from kvmesh.types import FinishReason, SamplingParams, TokenLogprob
from tests.unit.engine.tiny import VOCABULARY, tiny_model

ENDS = [2, 17, 40, 41, 63]
WIDTHS = st.integers(2, 5)
PENALTIES = st.sampled_from([0.0, 0.6, 1.0, 2.0, -1.0])
PROMPTS = st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=40)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    oracle, folder = tiny_model("llama", tmp_path_factory.mktemp("llama"))
    return oracle, load(folder, "float32", "cpu")


def engine_of(pair, blocks=96, **more):
    return EngineCore(TorchRunner(pair[1], blocks), **more)


def request(name, prompt, samples=(Sample(0),), **params):
    params = {"eos_token_ids": frozenset(ENDS), "max_tokens": 12, **params}
    return EngineRequest(name, tuple(prompt), SamplingParams(**params), samples)


def run(engine):
    outputs: dict[str, dict[int, list[int]]] = {}
    while engine.has_work():
        for event in engine.step():
            assert not isinstance(event, Failed), event
            if isinstance(event, TokenOutput):
                sample = outputs.setdefault(event.request_id, {}).setdefault(event.index, [])
                assert event.offset == len(sample)
                sample.append(event.token_id)
    assert engine.check_integrity() == []
    assert engine.statistics().blocks_used == 0
    return {name: [samples[index] for index in sorted(samples)] for name, samples in outputs.items()}


def expected(pair, prompt, width, n, longest=12, **more):
    with torch.inference_mode():
        found = pair[0].generate(
            torch.tensor([prompt]), num_beams=width, num_return_sequences=n, max_new_tokens=longest, do_sample=False,
            eos_token_id=ENDS, pad_token_id=0, **more,
        )  # fmt: skip
    outputs = [tokens[len(prompt) :].tolist() for tokens in found]
    return [output[: next((i + 1 for i, t in enumerate(output) if t in ENDS), longest)] for output in outputs]


@settings(max_examples=30, deadline=None)
@given(prompt=PROMPTS, width=WIDTHS, penalty=PENALTIES, early=st.booleans(), data=st.data())
def test_the_hypotheses_are_those_of_transformers(pair, prompt, width, penalty, early, data):
    n = data.draw(st.integers(1, width))
    engine = engine_of(pair)
    samples = tuple(map(Sample, range(n)))
    params = {"beam_width": width, "n": n, "length_penalty": penalty, "early_stopping": early}
    engine.add(request("beams", prompt, samples, **params))
    assert run(engine)["beams"] == expected(pair, prompt, width, n, length_penalty=penalty, early_stopping=early)


@settings(max_examples=10, deadline=None)
@given(prompts=st.lists(PROMPTS, min_size=2, max_size=4, unique_by=tuple), width=WIDTHS, blocks=st.integers(14, 30))
def test_neighbours_and_a_small_pool_change_nothing(pair, prompts, width, blocks):
    """Beams give way as a whole, start anew and come to the same end."""
    engine = engine_of(pair, blocks, max_running=8, token_budget=24)
    greedy = engine_of(pair)
    for number, prompt in enumerate(prompts):
        engine.add(request(f"b{number}", prompt, beam_width=width))
        engine.add(request(f"g{number}", prompt[::-1], temperature=0.0))
        greedy.add(request(f"g{number}", prompt[::-1], temperature=0.0))
    found = run(engine)
    for number, prompt in enumerate(prompts):
        assert found[f"b{number}"] == expected(pair, prompt, width, 1)
    assert {name: tokens for name, tokens in found.items() if name[0] == "g"} == run(greedy)


def test_full_blocks_are_shared_among_beams(pair):
    """Four beams of a prompt of 64 tokens hold it once: 4 shared blocks, and at most two of each beam's own."""
    engine = engine_of(pair)
    engine.add(request("beams", range(3, 67), beam_width=4, eos_token_ids=frozenset()))
    used = []
    while engine.has_work():
        engine.step()
        used.append(engine.statistics().blocks_used)
    assert 4 < max(used) <= 4 + 4 * 2


def test_a_sample_that_is_known_in_part_gets_the_rest(pair):
    engine = engine_of(pair)
    (whole,) = expected(pair, [5, 6, 7], 3, 1)
    engine.add(request("again", [5, 6, 7], (Sample(0, tuple(whole[:2])),), beam_width=3))
    rest = []
    while engine.has_work():
        rest += [(event.offset, event.token_id) for event in engine.step() if isinstance(event, TokenOutput)]
    assert rest == list(enumerate(whole))[2:]


def test_what_could_never_run_is_refused(pair):
    with pytest.raises(Overloaded, match="beams"):
        engine_of(pair, 8).add(request("wide", [3] * 40, beam_width=5, max_tokens=80))
    with pytest.raises(Overloaded, match="at once"):
        engine_of(pair, max_running=3).add(request("wide", [3], beam_width=4))
    params = SamplingParams(max_tokens=3, beam_width=2)
    with pytest.raises(InvalidArgument, match="beam"):
        engine_of(pair).add(EngineRequest("p", (3,), params, prefill_only=True))


def test_an_abort_frees_every_beam(pair):
    engine = engine_of(pair)
    engine.add(request("beams", range(3, 40), beam_width=4))
    for _ in range(4):
        engine.step()
    assert engine.abort("beams")
    assert engine.statistics().blocks_used == 0
    assert engine.check_integrity() == []


def test_impossible_tokens_are_no_beams():
    search = BeamSearch(SamplingParams(max_tokens=3, beam_width=2, eos_token_ids=frozenset({9})), 3)
    search.advance([[TokenLogprob(4, -0.5), TokenLogprob(5, -math.inf), TokenLogprob(9, -math.inf)]])
    assert [beam.tokens[-1].token_id for beam in search.beams] == [4]
    search.advance([[TokenLogprob(9, -0.1), TokenLogprob(1, -math.inf)]])
    assert search.done
    assert [(h.reason, len(h.beam.tokens)) for h in search.best()] == [(FinishReason.STOP, 2)]
