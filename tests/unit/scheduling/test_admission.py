"""Admission: bounds, order, deadlines, and counters that return to zero."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.scheduling.admission import Admission, Admitted, Queued, Refused

LATER = 1e9


def test_admits_up_to_the_limit_then_queues_in_order_then_refuses():
    admission = Admission(max_running=2, max_queued=2)
    decisions = [admission.submit(key, 0.0, LATER) for key in "abcde"]
    assert decisions[:4] == [Admitted(), Admitted(), Queued(0), Queued(1)]
    assert isinstance(decisions[4], Refused)
    assert admission.finish("b", 1.0) == ["c"]
    assert admission.finish("a", 2.0) == ["d"]


def test_a_newcomer_never_overtakes_the_queue():
    admission = Admission(max_running=1, max_queued=2)
    for key in "abc":
        admission.submit(key, 0.0, LATER)
    assert admission.finish("a", 0.0) == ["b"]
    assert isinstance(admission.submit("d", 0.0, LATER), Queued)
    assert admission.finish("b", 0.0) == ["c"]


def test_queue_of_zero_refuses_at_once():
    admission = Admission(max_running=1, max_queued=0)
    admission.submit("a", 0.0, LATER)
    assert isinstance(admission.submit("b", 0.0, LATER), Refused)


def test_retry_after_follows_the_throughput_under_load():
    admission = Admission(max_running=1, max_queued=3)
    for key in range(4):
        admission.submit(key, 0.0, LATER)
    for now, key in enumerate(range(3), start=1):
        admission.finish(key, now * 5.0)
        admission.submit(key + 4, now * 5.0, LATER)
    refused = admission.submit("late", 15.0, LATER)
    assert refused == Refused(pytest.approx(20.0))


def test_who_cannot_start_in_time_is_refused_not_queued():
    admission = Admission(max_running=1, max_queued=100)
    for key in range(4):
        admission.submit(key, 0.0, LATER)
    admission.finish(0, 10.0)
    admission.finish(1, 20.0)
    assert isinstance(admission.submit("hasty", 20.0, 25.0), Refused)
    assert isinstance(admission.submit("patient", 20.0, 60.0), Queued)


def test_an_expired_one_is_skipped_when_a_place_is_free():
    admission = Admission(max_running=1, max_queued=2)
    admission.submit("a", 0.0, LATER)
    admission.submit("b", 0.0, 5.0)
    admission.submit("c", 0.0, LATER)
    assert admission.finish("a", 6.0) == ["c"]


@given(st.integers(1, 4), st.integers(0, 4), st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=60))
def test_invariants_hold_and_everything_returns_to_zero(max_running, max_queued, steps):
    admission, known = Admission(max_running, max_queued), set()
    for now, (key, submit) in enumerate(steps):
        if submit and key not in known:
            if not isinstance(admission.submit(key, now, LATER), Refused):
                known.add(key)
        elif not submit:
            admission.finish(key, now)
            known.discard(key)
        assert admission.check_integrity() == []
        assert admission.running + admission.waiting == len(known)
    for key in range(10):
        admission.finish(key, 100.0)
    assert (admission.running, admission.waiting) == (0, 0)
