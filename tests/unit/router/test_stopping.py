"""Stop strings against a brute-force search over the whole text, for any split."""

from hypothesis import given
from hypothesis import strategies as st

from kvmesh.types import FinishReason, TokenBatch
from kvmesh_router.output import SampleOutput
from kvmesh_router.stopping import Checked, StopChecker
from kvmesh_router.tokenizer import fake_tokenizer

FAKE = fake_tokenizer()
STOPS = st.lists(st.text("ab€", min_size=1, max_size=5), min_size=1, max_size=4, unique=True)


def first_stop(text, stops, completed_after=0):
    """(end, stop): completed first, then the longest; by trying every end."""
    for end in range(completed_after + 1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return end, max(ending, key=len)
    return None


@given(STOPS, st.lists(st.text("ab€", max_size=6), max_size=12))
def test_checker_finds_what_brute_force_finds(stops, parts):
    checker, out = StopChecker(stops), ""
    expected = first_stop("".join(parts), stops)
    for part in parts:
        checked = checker.feed(part)
        out += checked.text
        if checked.matched:
            break
    else:
        checked = Checked(checker.flush())
        out += checked.text
    if expected is None:
        assert (out, checked.matched) == ("".join(parts), None)
    else:
        end, stop = expected
        assert (out, checked.matched) == ("".join(parts)[: end - len(stop)], stop)


@given(STOPS, st.text("ab€", max_size=30))
def test_holds_back_no_more_than_could_begin_a_stop_string(stops, text):
    checker, out = StopChecker(stops), ""
    for char in text:
        checked = checker.feed(char)
        if checked.matched:
            return
        out += checked.text
        held = text[len(out) :][: len(checker.fork().flush())]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


def text_after(ids, tokens):
    """The text certain after so many tokens: what a client could have seen, with stop strings aside."""
    return FAKE.decode(list(ids[:tokens])).rstrip("\ufffd")


@given(STOPS, st.text("ab€", max_size=20), st.lists(st.integers(1, 5), max_size=20), st.integers(0, 12))
def test_sample_stops_at_the_same_token_however_batched(stops, text, sizes, min_tokens):
    ids = tuple(text.encode())
    sample, deltas, at = SampleOutput(0, FAKE.decode, stops, min_tokens), [], 0
    for size in [*sizes, len(ids)]:
        batch = ids[at : at + size]
        last = at + size >= len(ids)
        delta = sample.take(TokenBatch(0, at, batch, finish_reason=FinishReason.LENGTH if last else None))
        at += len(batch)
        if delta:
            deltas.append(delta)
        if sample.choice:
            break
    floor = len(text_after(ids, max(0, min_tokens - 1)))
    expected = first_stop(text, stops, floor) if len(ids) >= min_tokens else None
    out = "".join(delta.text for delta in deltas)
    if expected is None:
        assert (out, sample.choice.reason, sample.choice.stop) == (text, FinishReason.LENGTH, None)
        return
    end, stop = expected
    assert (out, sample.choice.reason, sample.choice.stop) == (text[: end - len(stop)], FinishReason.STOP, stop)
    used = next(n for n in range(len(ids) + 1) if len(text_after(ids, n)) >= end)
    assert sample.choice.completion_tokens == len(sample.tokens) == deltas[-1].token_offset == max(used, 0)
