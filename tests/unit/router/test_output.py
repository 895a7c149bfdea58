"""A sample's deltas: each output position exactly once, whatever workers send."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.types import FinishReason, PositionLogprobs, TokenBatch, TokenLogprob
from kvmesh_router.output import SampleOutput, TokenGap
from kvmesh_router.tokenizer import fake_tokenizer

DECODE = fake_tokenizer().decode


def ids(text):
    return tuple(text.encode())


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 10)), max_size=30))
def test_duplicates_are_dropped_and_gaps_refused(spans):
    tokens, sample, got = ids("abcdefghijklmnopqrstuvwxyz12345"), SampleOutput(0, DECODE), ""
    for start, count in spans:
        batch = TokenBatch(0, start, tokens[start : start + count])
        if start > len(sample.tokens):
            with pytest.raises(TokenGap):
                sample.take(batch)
        elif delta := sample.take(batch):
            got += delta.text
            assert delta.token_offset == len(sample.tokens)
    assert got.encode() == bytes(sample.tokens) == bytes(tokens[: len(sample.tokens)])


def test_logprobs_stay_with_their_tokens():
    logprobs = tuple(PositionLogprobs(TokenLogprob(i, -1.0)) for i in ids("abc"))
    sample = SampleOutput(0, DECODE, stop=["bX", "b"])
    assert sample.take(TokenBatch(0, 0, ids("a"), logprobs[:1])).logprobs == logprobs[:1]
    delta = sample.take(TokenBatch(0, 0, ids("abc"), logprobs))
    assert delta.token_ids == ids("b")
    assert delta.logprobs == logprobs[1:2]
    assert delta.text == ""


def test_a_stop_token_shows_no_text_and_is_reported():
    sample = SampleOutput(0, DECODE)
    delta = sample.take(TokenBatch(0, 0, ids("ab!"), (), FinishReason.STOP, ord("!")))
    assert (delta.text, delta.token_ids) == ("ab", ids("ab!"))
    assert (sample.choice.reason, sample.choice.stop_token_id) == (FinishReason.STOP, ord("!"))
    assert sample.take(TokenBatch(0, 3, ids("more"))) is None


def test_text_held_for_a_stop_string_comes_at_the_end():
    sample = SampleOutput(0, DECODE, stop=["<end>"])
    assert sample.take(TokenBatch(0, 0, ids("x<en"))).text == "x"
    assert sample.take(TokenBatch(0, 4, (), (), FinishReason.LENGTH)).text == "<en"


def test_abort_gives_what_was_held_back():
    sample = SampleOutput(0, DECODE, stop=["<end>"])
    sample.take(TokenBatch(0, 0, ids("x<en")))
    assert sample.abort().text == "<en"
    assert sample.choice.reason is FinishReason.ABORTED
    assert sample.abort() is None


def test_without_text_only_tokens_come():
    sample = SampleOutput(0, None)
    assert sample.take(TokenBatch(0, 0, ids("abc"))).text == ""
