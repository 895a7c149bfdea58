"""Power profiles: what ships is what the table gives, errors on held-out settings are small, physics holds."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.errors import NotFound
from kvmesh.planner.power import fitting
from kvmesh.planner.power.profile import FULL, Curve, assumed, capped, profile, profiles

TABLE = Path(__file__).parents[4] / "shared/traces/calibration/splitwise_perf_model.csv"
LLAMA = "A100-80G/llama2-70b/8"
names = st.sampled_from(sorted(profiles()))


@pytest.fixture(scope="module")
def runs():
    if not TABLE.exists():
        pytest.skip("the calibration table is not here")
    return fitting.read_runs(TABLE)


def test_held_out_errors_are_small(runs):
    kinds = {(run.model, run.tensor_parallel) for run in runs if run.peak}
    assert len(kinds) == 4
    for model, degree in kinds:
        found = fitting.fit([r for r in runs if r.peak and (r.model, r.tensor_parallel) == (model, degree)])
        assert found.prefill_error < 0.08
        assert found.decode_error < 0.02


def test_what_ships_is_what_the_table_gives(runs):
    shipped = {entry["name"]: entry for entry in fitting.entries(runs)}
    assert shipped.keys() == profiles().keys()
    for name, entry in shipped.items():
        assert profile(name).prefill == Curve(*entry["prefill"])
        assert profile(name).step_seconds == tuple((x, y / 1e3) for x, y in entry["step_ms"])


def test_a_curve_is_found_again():
    curve = Curve(0.2, 0.1, 0.9)
    samples = [(float(2**power), curve(2**power)) for power in range(13)]
    found = fitting._rising(samples)
    for x, y in samples:
        assert found(x) == pytest.approx(y, abs=1e-9)


@given(names, st.floats(1, 8192), st.floats(1, 64))
def test_watts_lie_between_idle_and_what_was_measured(name, tokens, batch):
    machine = profile(name)
    for setting in (FULL, machine.locked(0.7 * machine.clock_mhz), capped(0.5)):
        for watts in (machine.prefill_watts(tokens, setting), machine.decode_watts(batch, setting)):
            assert machine.idle_watts <= watts <= 1.1 * machine.provisioned_watts


@given(names, st.floats(1, 8192), st.floats(1, 64), st.floats(0.3, 0.99))
def test_a_lower_clock_draws_less_and_takes_longer(name, tokens, batch, share):
    machine = profile(name)
    slow = machine.locked(share * machine.clock_mhz)
    assert machine.prefill_watts(tokens, slow) < machine.prefill_watts(tokens)
    assert machine.decode_watts(batch, slow) < machine.decode_watts(batch)
    assert machine.prefill_seconds(tokens, slow) > machine.prefill_seconds(tokens)
    assert machine.decode_seconds(batch, slow) > machine.decode_seconds(batch)


def test_locked_clocks_are_polcas_published_pair():
    """1110 MHz: a peak 20 % lower, decode 6 % slower."""
    machine = profile(LLAMA)
    slow = machine.locked(1110)
    peak = machine.idle + (1 - machine.idle) * slow.dynamic
    assert peak == pytest.approx(0.8)
    assert slow.decode_time == pytest.approx(1.06)


def test_batching_saves_as_much_as_the_leaderboard_measured():
    """ML.ENERGY, 70B on four H100: 3.76 J/token at batch 8 and 0.80 at 64, a factor of 4.7."""
    machine = profile(LLAMA)
    joules = [machine.decode_watts(batch) * machine.decode_seconds(batch) / batch for batch in (8, 64)]
    assert joules[0] / joules[1] == pytest.approx(3.76 / 0.80, rel=0.15)


def test_a_power_limit_slows_prompts_only():
    machine, limit = profile(LLAMA), capped(0.5)
    assert machine.prefill_watts(4096, limit) == 0.5 * machine.provisioned_watts
    assert machine.prefill_seconds(1024, limit) == pytest.approx(1.3 * machine.prefill_seconds(1024))
    assert machine.decode_seconds(16, limit) == machine.decode_seconds(16)


def test_unknown_and_assumed_profiles():
    with pytest.raises(NotFound, match=r"no power profile 'T4': there are A100-80G/"):
        profile("T4")
    guess = assumed("T4", 70, like=profile(LLAMA))
    assert guess.provisioned_watts == 70
    assert guess.origin.startswith("assumed")
