"""The energy program against brute force: every number of instances, and a linear program for the rest."""

from itertools import product
from math import inf

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from kvmesh.errors import InvalidArgument
from kvmesh.planner.power.accounting import Busy, energy, simulated
from kvmesh.planner.power.operation import BUSY, Aim, Demand, Pool, Prices, operate
from kvmesh.planner.power.points import Limits, OperatingPoint, operating_points
from kvmesh.planner.power.profile import FULL, profile
from kvmesh.planner.simulator.outcome import Outcome, Served, Usage
from kvmesh.planner.world import Phase

MACHINE = profile("A100-80G/llama2-70b/8")


@st.composite
def points(draw):
    idle = draw(st.floats(10, 100))
    watts = st.floats(1.0, 5.0).map(lambda times: idle * times)
    return OperatingPoint(
        name="point",
        prefill_seconds=draw(st.floats(1e-4, 1e-3)),
        decode_seconds=draw(st.floats(1e-3, 1e-2)),
        prefill_watts=draw(watts),
        decode_watts=draw(watts),
        idle_watts=idle,
        step_seconds=draw(st.floats(0.01, 0.09)),
        prefill_use=draw(st.floats(0.3, 1.0)),
        least=draw(st.sampled_from([0.0, 0.3])),
    )


@st.composite
def pools(draw):
    return Pool(
        "pool",
        draw(st.integers(1, 2)),
        tuple(draw(st.lists(points(), min_size=1, max_size=2))),
        draw(st.sampled_from(list(Phase))),
        dollars_per_hour=draw(st.floats(0, 3)),
        asleep_watts=draw(st.sampled_from([0.0, 5.0])),
        balanced=draw(st.booleans()),
    )


def brute_force(pools, demand, aim, prices, budget):
    """The least objective, or None if nothing is feasible."""
    columns = [(number, point) for number, pool in enumerate(pools) for point in pool.points]
    best = None
    for counts in product(*(range(pools[number].count + 1) for number, _ in columns)):
        running = [
            sum(n for (i, _), n in zip(columns, counts, strict=True) if i == number) for number in range(len(pools))
        ]
        if any(on > pool.count for on, pool in zip(running, pools, strict=True)):
            continue
        watts = sum(n * point.idle_watts for (_, point), n in zip(columns, counts, strict=True))
        watts += sum((pool.count - on) * pool.asleep_watts for pool, on in zip(pools, running, strict=True))
        dynamic = shares(pools, columns, counts, demand, aim, prices, budget - watts)
        if dynamic is None:
            continue
        rent = sum(on * pool.dollars_per_hour for pool, on in zip(pools, running, strict=True))
        cost = {
            Aim.ENERGY: watts + dynamic,
            Aim.COST: rent + (watts + dynamic) / 1e3 * prices.dollars_per_kwh,
            Aim.CARBON: (watts + dynamic) / 1e3 * prices.grams_per_kwh,
        }[aim]
        best = cost if best is None else min(best, cost)
    return best


def shares(pools, columns, counts, demand, aim, prices, budget):
    """The least dynamic watts for given instances: all three aims rise with them."""
    joules, upper, right, equal, value = [], [], [], [[], []], [demand.prompt_tokens, demand.output_tokens]
    width = 2 * len(columns)
    bounds = []
    for k, ((number, point), n) in enumerate(zip(columns, counts, strict=True)):
        pool, prompt, output = pools[number], 2 * k, 2 * k + 1
        mixed = pool.phase is Phase.MIXED
        use = min(point.prefill_use, max(0.0, 1 - point.step_seconds / demand.tpot)) if mixed else point.prefill_use
        joules += [point.prefill_joules, point.decode_joules]
        time, room, batch = np.zeros(width), np.zeros(width), np.zeros(width)
        time[prompt], time[output] = point.prefill_seconds, point.decode_seconds
        room[prompt] = point.prefill_seconds
        batch[prompt], batch[output] = -point.least * point.prefill_seconds, -point.decode_seconds
        upper += [time, room, batch]
        right += [BUSY * n, use * n, -point.least * n]
        if pool.balanced:
            ratio = np.zeros(width)
            ratio[prompt], ratio[output] = 1.0, -demand.prompt_tokens / demand.output_tokens
            equal.append(ratio)
            value.append(0.0)
        bounds += [(0, None if pool.phase.prefills else 0), (0, None if pool.phase.decodes else 0)]
    equal[0], equal[1] = np.tile([1.0, 0.0], len(columns)), np.tile([0.0, 1.0], len(columns))
    if budget < inf:
        upper.append(np.array(joules))
        right.append(budget)
    found = linprog(joules, A_ub=upper, b_ub=right, A_eq=equal, b_eq=value, bounds=bounds)
    return found.fun if found.success else None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(pools(), min_size=1, max_size=2),
    st.floats(50, 2000),
    st.floats(10, 300),
    st.sampled_from(list(Aim)),
    st.one_of(st.just(inf), st.floats(50, 1500)),
)
def test_against_brute_force(pools, prompt, output, aim, budget):
    pools = [
        Pool(f"pool-{i}", p.count, p.points, p.phase, p.dollars_per_hour, p.asleep_watts, p.balanced)
        for i, p in enumerate(pools)
    ]
    demand, prices = Demand(prompt, output, tpot=0.1), Prices(0.2, 400)
    best = brute_force(pools, demand, aim, prices, budget)
    if best is None:
        with pytest.raises(InvalidArgument):
            operate(pools, demand, aim, prices, budget)
        return
    found = operate(pools, demand, aim, prices, budget)
    assert found.objective == pytest.approx(best, rel=1e-4, abs=1e-4)
    assert found.bound <= found.objective + 1e-6 * abs(found.objective) + 1e-6
    assert found.watts <= budget * (1 + 1e-6)
    assert sum(choice.prompt_tokens for choice in found.choices) == pytest.approx(prompt, rel=1e-5)


def fleet(count, settings=(FULL,)):
    limits = Limits(1.0, 0.1)
    return Pool("fleet", count, operating_points(MACHINE, 1000, limits, settings), dollars_per_hour=20.0)


def demand(rate):
    return Demand(rate * 1000, rate * 200, tpot=0.1)


def test_little_load_puts_most_instances_to_sleep():
    assert operate([fleet(16)], demand(1.0)).on == {"fleet": 1}
    on = [sum(operate([fleet(16)], demand(rate)).on.values()) for rate in (1, 4, 8, 16)]
    assert on == sorted(on)
    assert on[-1] > on[0]


def test_clocks_only_help():
    clocks = (FULL, MACHINE.locked(1305), MACHINE.locked(1110))
    for rate in (1, 5, 11):
        assert operate([fleet(16, clocks)], demand(rate)).watts <= operate([fleet(16)], demand(rate)).watts + 1e-6


def test_carbon_and_cost_follow_from_watts():
    found = operate([fleet(16)], demand(5), prices=Prices(0.15, 380))
    assert found.grams_per_hour == pytest.approx(found.watts / 1e3 * 380)
    assert found.dollars_per_hour == pytest.approx(20 * found.on["fleet"] + found.watts / 1e3 * 0.15)


@pytest.mark.parametrize(
    ("pool", "budget", "message"),
    [
        (fleet(2), inf, r"the 2 instances of fleet cannot serve 20000 prompt and 4000 output tokens/s"),
        (fleet(40), 5000, r"the power budget of 5000 W is too small: .* need at least \d+ W"),
        (Pool("fleet", 4, operating_points(MACHINE, 1000, Limits(0.1, 0.1))), inf, "no operating point of any pool"),
    ],
)
def test_what_fails_first_is_said(pool, budget, message):
    with pytest.raises(InvalidArgument, match=message):
        operate([pool], demand(20), budget_watts=budget)


@given(st.floats(0, 100), st.floats(0, 100), st.floats(0, 100))
def test_joules_are_idle_and_busy_ones(idle, prefill, decode):
    busy = Busy(MACHINE, idle + prefill + decode, prefill, decode, mean_prompt=1000, mean_batch=8, dollars_per_hour=36)
    total = energy([busy, busy], 1000, Prices(grams_per_kwh=400))
    one = MACHINE.idle_watts * idle + MACHINE.prefill_watts(1000) * prefill + MACHINE.decode_watts(8) * decode
    assert total.joules == pytest.approx(2 * one)
    assert total.grams == pytest.approx(2 * one / 3.6e6 * 400)
    assert total.dollars == pytest.approx(2 * 36 * (idle + prefill + decode) / 3600)
    assume(one > 0)
    assert total.joules_per_token == pytest.approx(2 * one / 1000)


def test_a_simulated_run_is_priced_by_phase():
    """One instance computed prompts for 2 s of 10, the other decoded for 4 s at a mean batch of 8."""
    requests = [Served(0.0, 1000, 100, first_token=1.0, finish=10.0), Served(0.0, 1000, 100)]
    instances = [
        Usage("prefill", 10, busy=2.0, prompt_tokens=2000),
        Usage("decode", 10, busy=4.0, batch_seconds=32.0, output_tokens=100),
    ]
    found = simulated(Outcome(requests, instances, 1.0, 1), lambda name: MACHINE)
    idle = MACHINE.idle_watts * (8 + 6)
    assert found.joules == pytest.approx(idle + 2 * MACHINE.prefill_watts(1000) + 4 * MACHINE.decode_watts(8))
    assert found.output_tokens == 100
