"""Masks of allowed tokens: whatever is drawn from them matches the grammar, and a lost matcher changes nothing."""

import json
import random
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kvmesh.engine.api import EngineRequest, Failed, Sample, TokenOutput
from kvmesh.engine.batch import Draw
from kvmesh.engine.core import EngineCore
from kvmesh.engine.grammar import Grammars
from kvmesh.engine.loading import load
from kvmesh.engine.runner import TorchRunner
from kvmesh.errors import InvalidArgument
from kvmesh.types import FinishReason, Grammar, GrammarKind, SamplingParams
from tests.unit.engine.tiny import tiny_model

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "pets": {"enum": ["cat", "dog", None]},
    },
    "required": ["name", "age", "pets"],
    "additionalProperties": False,
}
SCHEMA = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(PERSON))
DATE = Grammar(GrammarKind.REGEX, r"(19|20)[0-9]{2}-(0[1-9]|1[0-2])-[0-3][0-9]")
SUM = Grammar(GrammarKind.LARK, 'start: NUMBER ("+" NUMBER)* "=" NUMBER\nNUMBER: /[1-9][0-9]{0,3}/')
PATTERNS = {DATE: DATE.text, SUM: r"[1-9][0-9]{0,3}(\+[1-9][0-9]{0,3})*=[1-9][0-9]{0,3}"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Bytes, a few words and an end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    vocabulary |= {word: len(vocabulary) + n for n, word in enumerate(('":', '"na', "19", "20", "-0", "<end>"))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def text_of(tokenizer):
    return Tokenizer.from_file(str(tokenizer)).decode


@pytest.fixture(scope="module")
def end(tokenizer):
    return Tokenizer.from_file(str(tokenizer)).token_to_id("<end>")


@pytest.fixture
def grammars(tokenizer, end):
    return Grammars(tokenizer, end + 1, [end])


def draw(grammar, output, request_id="r", index=0):
    return Draw(SamplingParams(max_tokens=99, grammar=grammar), index, len(output), (), output, request_id)


def walk(grammars, grammar, rng, end, limit=400):
    """Tokens up to the end, each drawn evenly from those allowed."""
    output: list[int] = []
    while len(output) < limit:
        allowed, problems = grammars.allowed([draw(grammar, output)])
        assert problems == [""]
        token = rng.choice(np.flatnonzero(allowed[0]).tolist())
        if token == end:
            return output
        output.append(token)
    raise AssertionError("no end")


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_what_is_drawn_is_json_of_the_schema(tokenizer, end, text_of, seed):
    tokens = walk(Grammars(tokenizer, end + 1, [end]), SCHEMA, random.Random(seed), end)
    person = json.loads(text_of(tokens), strict=False)
    assert person.keys() == {"name", "age", "pets"}
    assert isinstance(person["age"], int)
    assert 0 <= person["age"] <= 150
    assert person["pets"] in PERSON["properties"]["pets"]["enum"]
    assert len(person["name"]) <= 8


@pytest.mark.parametrize("grammar", PATTERNS, ids=["regex", "lark"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_what_is_drawn_matches_the_pattern(tokenizer, end, text_of, grammar, seed):
    text = text_of(walk(Grammars(tokenizer, end + 1, [end]), grammar, random.Random(seed), end))
    assert re.fullmatch(PATTERNS[grammar], text)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), share=st.floats(0, 1))
def test_a_matcher_made_anew_allows_the_same(tokenizer, end, seed, share):
    tokens = walk(one := Grammars(tokenizer, end + 1, [end]), SCHEMA, random.Random(seed), end)
    cut = tokens[: int(share * len(tokens))]
    elsewhere = Grammars(tokenizer, end + 1, [end])
    np.testing.assert_array_equal(one.allowed([draw(SCHEMA, cut)])[0], elsewhere.allowed([draw(SCHEMA, cut)])[0])


def test_a_batch_of_unlike_grammars_keeps_them_apart(grammars, end):
    together, _ = grammars.allowed([draw(SCHEMA, [], "a"), draw(DATE, [], "b"), draw(SUM, [], "c", 1)])
    for row, grammar in enumerate((SCHEMA, DATE, SUM)):
        np.testing.assert_array_equal(together[row], grammars.allowed([draw(grammar, [], f"{row}")])[0][0])
    assert not together[:, end].any()


def test_an_output_that_does_not_match_is_a_problem(grammars):
    allowed, (problem, none) = grammars.allowed([draw(DATE, [0, 0], "a"), draw(DATE, [], "b")])
    assert problem
    assert not none
    assert not allowed[0].any()
    assert allowed[1].any()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(tiny_model("llama", tmp_path_factory.mktemp("llama"), vocab_size=272)[1], "float32", "cpu")


class TestInTheEngine:
    @pytest.fixture
    def engine(self, model, tokenizer, end):
        return EngineCore(TorchRunner(model, 64, grammars=Grammars(tokenizer, 272, [end])))

    def run(self, engine):
        events = []
        while engine.has_work():
            events += engine.step()
        return events

    def tokens(self, events, request_id):
        return [e.token_id for e in events if isinstance(e, TokenOutput) and e.request_id == request_id]

    def params(self, end, **more):
        return SamplingParams(max_tokens=60, eos_token_ids=frozenset({end}), **more)

    def test_samples_obey_and_their_neighbours_are_free(self, engine, end, text_of):
        engine.add(EngineRequest("bound", (1, 2, 3), self.params(end, grammar=DATE, temperature=3.0, seed=5)))
        engine.add(EngineRequest("free", (1, 2, 3), self.params(end, temperature=0.0, ignore_eos=True)))
        events = self.run(engine)
        assert re.fullmatch(DATE.text, text_of(self.tokens(events, "bound")))
        engine.add(EngineRequest("alone", (1, 2, 3), self.params(end, temperature=0.0, ignore_eos=True)))
        assert self.tokens(self.run(engine), "alone") == self.tokens(events, "free")
        reasons = [e.finish_reason for e in events if isinstance(e, TokenOutput) and e.request_id == "bound"]
        assert reasons[-1] is FinishReason.STOP

    def test_one_that_cannot_go_on_fails_alone(self, engine, end):
        engine.add(EngineRequest("bad", (4, 5), self.params(end, grammar=DATE), (Sample(0, (0, 0)),)))
        engine.add(EngineRequest("good", (4, 5), self.params(end, temperature=0.0)))
        events = self.run(engine)
        (failed,) = [event for event in events if isinstance(event, Failed)]
        assert failed.request_id == "bad"
        assert isinstance(failed.error, InvalidArgument)
        assert self.tokens(events, "good")
        assert not engine.check_integrity()
        assert engine.statistics().blocks_used == 0

    def test_logprobs_are_of_what_is_allowed(self, engine, end):
        engine.add(EngineRequest("r", (7,), self.params(end, grammar=DATE, temperature=0.0, logprobs=4)))
        first = next(event for event in self.run(engine) if isinstance(event, TokenOutput))
        mass = torch.tensor([entry.logprob for entry in first.logprobs.top]).exp()
        assert float(mass.nan_to_num().sum()) <= 1 + 1e-6
        assert first.logprobs.chosen.token_id == first.token_id
