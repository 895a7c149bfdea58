"""The policy of adaptive streaming, against every fixed choice and against links that change."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.scheduling.compute import ComputeSpeed
from kvmesh.scheduling.link import Link
from kvmesh.scheduling.streaming import FREE, LOOK_AHEAD, MARGIN, Offer, Outlook, Streaming, Version, plans_of
from tests.unit.scheduling.streaming_simulation import CHUNK, ELEMENTS, adaptive, fixed, offers, speed

BITS = (0.4, 0.75, 1.2, 2.0)
MBIT = 1e6 / 8


def known(rate):
    """A link on which `rate` bytes per second were measured."""
    link = Link()
    link.end(link.begin(0.0), int(rate), 1.0)
    return link


@given(
    mbit=st.floats(5, 20_000),
    tokens_per_second=st.floats(100, 50_000),
    decode=st.floats(0, 0.2),
    count=st.integers(1, 40),
    floor=st.integers(1, 4),
)
@settings(max_examples=80, deadline=None)
def test_on_a_constant_link_no_fixed_choice_is_faster_by_five_per_cent(mbit, tokens_per_second, decode, count, floor):
    compute, chunks, rate = speed(tokens_per_second), offers(count, BITS, decode), mbit * MBIT
    policy = Streaming(count * CHUNK + 1, compute, floor)
    got = adaptive(policy, chunks, lambda _: rate, known(rate))
    best = min(fixed(chunks, quality, lambda _: rate, compute).seconds for quality in (0, *range(floor, 5)))
    assert got.seconds <= best * 1.05
    assert all(quality >= floor for quality in got.qualities)


def test_nothing_is_left_to_decide_where_all_is_fetched_in_its_only_version():
    policy, outlook = Streaming(100 * CHUNK + 1, speed(1000)), Outlook(1e9)
    assert policy.whole(offers(100, (1.2,), 0.0), outlook, 0.0)
    assert not policy.whole(offers(100, BITS, 0.0), outlook, 0.0)
    assert not policy.whole(offers(100, (1.2,), 0.0), Outlook(None), 0.0)
    assert not policy.whole(offers(100, (1.2,), 1.0), outlook, 0.0)


@given(mbit=st.floats(5, 20_000), tokens_per_second=st.floats(100, 50_000), limit=st.floats(0.05, 20))
@settings(max_examples=80, deadline=None)
def test_a_limit_that_a_fixed_choice_keeps_with_the_margin_is_kept_with_no_more_loss(mbit, tokens_per_second, limit):
    compute, chunks, rate = speed(tokens_per_second), offers(16, BITS, 0.01), mbit * MBIT
    got = adaptive(Streaming(16 * CHUNK + 1, compute, limit=limit), chunks, lambda _: rate, known(rate))
    choices = [fixed(chunks, quality, lambda _: rate, compute) for quality in range(5)]
    keeping = [choice for choice in choices if choice.seconds <= limit * (1 - MARGIN)]
    if keeping:
        assert got.seconds <= limit
        assert got.loss <= min(choice.loss for choice in keeping) + 1e-9


@given(rates=st.lists(st.floats(1e5, 1e9), min_size=2, max_size=2), limit=st.none() | st.floats(0.1, 10))
@settings(max_examples=80, deadline=None)
def test_a_faster_link_never_takes_longer(rates, limit):
    chunks, compute = offers(16, BITS, 0.02), speed(2000)
    slow, fast = sorted(rates)
    plans = [list(plans_of(chunks, Outlook(rate), compute, 16 * CHUNK)) for rate in (slow, fast)]
    assert all(f.seconds <= s.seconds for s, f in zip(*plans, strict=True))
    if limit is not None:
        loss = [Streaming(4096, compute, limit=limit).plan(chunks, Outlook(r), 0.0) for r in (slow, fast)]
        assert loss[1].loss <= loss[0].loss or loss[0].seconds > (1 - MARGIN) * limit


def test_after_a_step_down_the_next_choice_is_another():
    limit = 1.0
    policy, link = Streaming(16 * CHUNK + 1, speed(500), limit=limit), known(200 * MBIT)
    got = adaptive(policy, offers(16, BITS), lambda now: (200 if now < 0.3 else 40) * MBIT, link)
    best = got.qualities[0]
    changed = next(i for i, quality in enumerate(got.qualities) if quality < best)
    sent = sum(offers(1, BITS)[0].version(quality).size for quality in got.qualities[: changed - 2])
    assert sent <= 0.3 * 200 * MBIT
    assert got.seconds <= limit


def test_after_a_step_up_the_quality_rises_within_two_chunks():
    link, policy = known(20 * MBIT), Streaming(16 * CHUNK + 1, ComputeSpeed(), limit=3.0)
    got = adaptive(policy, offers(16, BITS), lambda now: (20 if now < 1.0 else 2000) * MBIT, link)
    assert got.qualities[-1] == 4
    assert got.seconds <= 3.0


def test_a_limit_that_cannot_be_kept_costs_quality_first():
    policy = Streaming(16 * CHUNK + 1, ComputeSpeed(), limit=0.01)
    assert adaptive(policy, offers(16, BITS), lambda _: MBIT, known(MBIT)).qualities == [1] * 16


def test_where_the_decoder_is_the_bottleneck_finer_chunks_come_free():
    policy = Streaming(16 * CHUNK + 1, ComputeSpeed())
    got = adaptive(policy, offers(16, BITS, 0.1), lambda _: 1000 * MBIT, known(1000 * MBIT))
    assert min(got.qualities) == 4


def test_where_the_link_is_slower_than_the_engine_all_is_computed():
    chunk = offers(1, (2.0,))[0].version(1).size
    policy = Streaming(8 * CHUNK + 1, speed(CHUNK / 0.5))
    assert policy.next(offers(8, (2.0,)), Outlook(chunk / 1.0), 0.0) is None
    assert policy.next(offers(8, (2.0,)), Outlook(chunk / 0.1), 0.0) is not None


def test_nothing_is_computed_by_choice_before_the_speed_is_known():
    policy = Streaming(8 * CHUNK + 1, ComputeSpeed())
    assert policy.next(offers(8, BITS), Outlook(1.0), 0.0) is not None
    assert policy.patience(offers(1, BITS)[0], 0.1, 0.0) == math.inf


def test_an_unmeasured_link_is_probed_with_the_coarsest_version_allowed():
    version = Streaming(2048, speed(1e6), floor=2).next(offers(8, BITS), Outlook(None), 0.0)
    assert version == offers(1, BITS)[0].version(2)


def test_requests_of_one_link_get_their_share():
    link = known(80 * MBIT)
    alone = Streaming(4096, ComputeSpeed(), limit=1.0).next(offers(15, BITS), Outlook(link.share), 0.0)
    link.requests = 4
    shared = Streaming(4096, ComputeSpeed(), limit=1.0).next(offers(15, BITS), Outlook(link.share), 0.0)
    assert alone.layers > shared.layers


def test_patience_is_what_computing_costs_and_leaves_time_to_keep_the_limit():
    chunk, compute = offers(1, BITS)[0], speed(512)
    assert Streaming(4096, compute).patience(chunk, 0.01, 0.0) == pytest.approx(8.0, rel=1e-3)
    assert Streaming(4096, compute, limit=11.0).patience(chunk, 0.01, 1.0) == pytest.approx(2.0, rel=1e-2)
    assert Streaming(4096, compute, limit=3.0).patience(chunk, 0.01, 1.0) == pytest.approx(8.0, rel=1e-3)
    assert Streaming(4096, compute).patience(chunk, 10.0, 0.0) == 40.0


def test_a_long_prompt_is_planned_in_bounded_time():
    assert len(list(plans_of(offers(4, BITS), Outlook(1e6), ComputeSpeed(), 4096))) == 4
    policy = Streaming(4096 * CHUNK, speed(1000))
    plan = policy.plan(offers(4096, BITS), Outlook(1e9), 0.0)
    assert plan.chunks == LOOK_AHEAD + 1


def test_chunks_of_one_version_are_taken_as_they_are():
    raw = Offer(0, CHUNK, (Version(0, 4 * ELEMENTS),), ELEMENTS)
    policy = Streaming(512, ComputeSpeed(), floor=3)
    assert policy.next([raw, *offers(2, BITS)[1:]], Outlook(1e6), 0.0) == raw.versions[0]
    assert raw.loss(raw.versions[0]) == 0
    assert 0 < FREE < 0.05
