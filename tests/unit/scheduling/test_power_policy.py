"""POLCA's policy: thresholds, order of caps, hysteresis; as invariants over arbitrary power."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.errors import Unavailable
from kvmesh.scheduling.power import HIGH_CAPS, LOW_CAPS, Cap, Level, PowerPolicy, Row, Thresholds

BUDGET = 1000.0
traces = st.lists(st.floats(0, 1200), min_size=1, max_size=200)


def run(trace, seconds=1.0):
    policy = PowerPolicy(BUDGET)
    return [policy.decide(watts, index * seconds) for index, watts in enumerate(trace)]


def test_the_steps_of_a_rise():
    assert run([700, 810, 810, 900, 900, 900, 900, 900, 900, 1010]) == [
        Level.FREE, Level.LOW, Level.LOW, *[Level.LOW_HARD] * 5, Level.ALL, Level.BRAKE,
    ]  # fmt: skip


def test_a_rise_past_both_thresholds_caps_low_priority_first():
    assert run([700, 950])[-1] is Level.LOW_HARD


@given(traces)
def test_above_the_budget_all_are_braked_at_once(trace):
    assert all(level is Level.BRAKE for watts, level in zip(trace, run(trace), strict=True) if watts > BUDGET)


@given(traces)
def test_above_the_second_threshold_low_priority_is_capped_hard(trace):
    over = [level for watts, level in zip(trace, run(trace), strict=True) if watts > 0.89 * BUDGET]
    assert all(level >= Level.LOW_HARD for level in over)


@given(traces)
def test_high_priority_is_capped_last(trace):
    """Never before low priority has been capped harder for the settling time, short of the brake."""
    levels = [Level.FREE, *run(trace)]
    for index, level in enumerate(levels):
        if level is Level.ALL and levels[index - 1] < Level.ALL:
            assert all(earlier is Level.LOW_HARD for earlier in levels[max(0, index - 5) : index])


@given(traces)
def test_caps_go_one_by_one_after_calm(trace):
    """No oscillation: a level is left only after `hold` seconds below its threshold less the margin."""
    thresholds = Thresholds()
    levels = run(trace)
    for index in range(1, len(levels)):
        if levels[index] < levels[index - 1]:
            assert levels[index] == levels[index - 1] - 1
            limit = (thresholds.of(levels[index - 1]) - thresholds.margin) * BUDGET
            assert index >= 30
            assert all(watts <= limit for watts in trace[index - 30 : index + 1])


@given(st.floats(0.76, 0.79).map(lambda share: share * BUDGET), st.integers(2, 100))
def test_power_between_uncap_and_cap_changes_nothing(watts, steps):
    assert set(run([watts] * steps)) == {Level.FREE}
    assert set(run([810.0] + [watts] * steps)) == {Level.LOW}


def test_caps_grow_with_the_level_and_spare_high_priority():
    for level in Level:
        assert HIGH_CAPS[level].clock >= LOW_CAPS[level].clock
        assert HIGH_CAPS[level].admission >= LOW_CAPS[level].admission
        if level:
            assert LOW_CAPS[level].clock <= LOW_CAPS[level - 1].clock


@pytest.mark.parametrize("values", [(0.9, 0.8, 0.05), (0.8, 1.0, 0.05), (0.8, 0.89, 0.8)])
def test_thresholds_out_of_order_are_refused(values):
    with pytest.raises(ValueError, match="thresholds must be"):
        Thresholds(*values)


class Recorder:
    def __init__(self, refusing=()):
        self.caps, self.refusing = [], refusing

    def cap(self, worker, cap):
        if worker in self.refusing:
            raise Unavailable("clocks may be set by root alone")
        self.caps.append((worker, cap))


def test_a_row_tells_only_what_changes_low_priority_first():
    recorder = Recorder()
    row = Row(PowerPolicy(BUDGET), recorder, frozenset({"z"}))
    row.observe({"a": 400, "z": 450}, 0)
    assert recorder.caps == [("z", LOW_CAPS[Level.LOW])]
    row.observe({"a": 400, "z": 450}, 1)
    assert len(recorder.caps) == 1
    row.observe({"a": 600, "z": 450}, 2)
    assert [worker for worker, _ in recorder.caps[1:]] == ["z", "a"]


def test_a_row_remembers_who_refuses_and_forgets_who_leaves():
    row = Row(PowerPolicy(BUDGET), Recorder(refusing={"z"}), frozenset({"z"}))
    row.observe({"a": 400, "z": 450}, 0)
    assert row.refused == {"z": "clocks may be set by root alone"}
    row.observe({"a": 400}, 1)
    assert row.refused == {}
    assert row.policy.cap(low_priority=False) == Cap()
