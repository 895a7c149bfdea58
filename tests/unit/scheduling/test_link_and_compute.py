"""What links and prompts are measured to take."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.scheduling.compute import ComputeSpeed
from kvmesh.scheduling.link import FAST, SMALLEST, Link

MB = 1 << 20


def shared(link, starts, size, rate):
    """Transfers of `size` bytes that share `rate` bytes per second fairly, moment by moment."""
    now, waiting, running = 0.0, sorted(starts), {}
    while waiting or running:
        until = waiting[0] if waiting else float("inf")
        least = min((left for left, _ in running.values()), default=float("inf"))
        then = min(until, now + least * len(running) / rate) if running else until
        done = (then - now) * rate / max(1, len(running))
        running = {key: (left - done, begun) for key, (left, begun) in running.items()}
        now = then
        for key in [key for key, (left, _) in running.items() if left <= 1e-6]:
            link.end(running.pop(key)[1], size, now)
        while waiting and waiting[0] <= now:
            waiting.pop(0)
            running[object()] = (float(size), link.begin(now))


@given(starts=st.lists(st.floats(0, 5), min_size=1, max_size=8), rate=st.floats(1e5, 1e9))
@settings(deadline=None)
def test_transfers_that_share_a_link_measure_the_whole_link(starts, rate):
    link = Link()
    shared(link, starts, MB, rate)
    assert link.throughput == pytest.approx(rate, rel=1e-3)


def test_one_after_the_other_or_side_by_side_makes_no_difference():
    """Two asked for at once, and sent whole one after the other."""
    link = Link()
    first, second = link.begin(0.0), link.begin(0.0)
    link.end(first, MB, 1.0)
    link.end(second, MB, 2.0)
    assert link.throughput == pytest.approx(MB, rel=0.2)


def test_a_link_that_slows_down_is_noticed_with_one_transfer():
    link = Link()
    for now in range(10):
        link.end(link.begin(now), 10 * MB, now + 1)
    link.end(link.begin(20.0), MB, 30.0)
    assert link.throughput < 2 * MB


def test_the_capacity_is_that_of_the_best_moments():
    link = Link()
    assert link.capacity is None
    link.end(link.begin(0.0), 10 * MB, 1.0)
    link.end(link.begin(1.0), MB, 1.3)
    assert link.throughput < 10 * MB
    assert link.capacity == pytest.approx(5 * MB)


def test_a_link_is_fast_until_something_stalls():
    link = Link()
    assert not link.fast
    link.requests = 2
    link.streamed(0.02, int(0.01 * FAST))
    assert link.throughput == pytest.approx(FAST)
    assert link.fast
    link.streamed(3.0, 0)
    assert not link.fast


def test_a_reader_that_is_busy_between_small_transfers_does_not_make_the_link_look_slow():
    """Bytes pass at 100 MB/s, and now and then it takes 20 ms to look at them."""
    link, now = Link(), 0.0
    for number in range(40):
        link.end(link.begin(now), MB // 2, now + (0.005 if number % 8 else 0.025))
        now += 0.1
    assert 80 * MB < link.capacity < 101 * MB


def test_a_burst_that_passes_at_once_does_not_make_the_link_look_fast():
    """A bucket that holds 128 KB, behind 12.5 MB/s."""
    link = Link()
    link.end(link.begin(0.0), MB, 0.08)
    link.end(link.begin(1.0), 100_000, 1.001)
    assert link.throughput == pytest.approx(link.capacity, rel=0.2)
    for now in range(2, 30):
        link.end(link.begin(now), 100_000, now + (0.001 if now % 8 == 0 else 0.008))
    assert link.capacity < 1.3 * 12.5 * MB


def test_the_capacity_of_a_link_that_has_become_slow_is_soon_known():
    link, now = Link(), 0.0
    for _ in range(20):
        link.end(link.begin(now), MB, now + 0.005)
        now += 0.005
    assert link.capacity == pytest.approx(200 * MB)
    for _ in range(18):
        link.end(link.begin(now), MB, now + 0.08)
        now += 0.08
    assert link.capacity == pytest.approx(12.5 * MB, rel=0.01)


def test_a_transfer_given_up_counts_against_the_link():
    link = Link()
    link.end(link.begin(0.0), MB, 1.0)
    link.end(link.begin(1.0), 0, 9.0)
    assert link.throughput < MB / 8


def test_what_is_small_measures_nothing_but_latency():
    link = Link(requests=3)
    link.end(link.begin(0.0), SMALLEST - 1, 1.0)
    assert (link.throughput, link.share) == (None, None)
    link.answered(0.2)
    link.answered(0.05)
    assert link.latency == 0.05
    link.end(link.begin(2.0), MB, 3.0)
    assert link.share == pytest.approx(MB / 3)


@given(per_token=st.floats(1e-5, 1e-2), per_pair=st.floats(0, 1e-6))
def test_both_terms_are_found(per_token, per_pair):
    speed = ComputeSpeed()
    for start, end in ((0, 256), (0, 2048), (1024, 1280), (3000, 4096)):
        speed.observe(start, end, per_token * (end - start) + per_pair * (end**2 - start**2) / 2)
    for start, end in ((0, 512), (512, 4096)):
        exact = per_token * (end - start) + per_pair * (end**2 - start**2) / 2
        assert speed.seconds(start, end) == pytest.approx(exact, rel=1e-2)


def test_what_is_far_from_all_measurements_is_taken_for_worse():
    speed = ComputeSpeed()
    speed.observe(0, 128, 0.128)
    assert speed.seconds(0, 512) == pytest.approx(0.512)
    assert speed.seconds(0, 4096) == pytest.approx(8.192)
    speed.observe(0, 1024, 1.024)
    assert speed.seconds(0, 4096) == pytest.approx(4.096)


def test_noise_makes_no_coefficient_negative():
    rng, speed = np.random.default_rng(0), ComputeSpeed()
    for _ in range(50):
        start, tokens = int(rng.integers(0, 4000)), int(rng.integers(16, 600))
        speed.observe(start, start + tokens, tokens * 1e-3 * float(rng.uniform(0.5, 2)))
        assert speed.seconds(0, 100) >= 0
        assert speed.seconds(0, 4000) >= speed.seconds(0, 2000)


def test_short_prompts_teach_nothing():
    speed = ComputeSpeed()
    speed.observe(0, 4, 1.0)
    assert (speed.measured, speed.seconds(0, 4096)) == (False, 0)
