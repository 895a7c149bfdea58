"""Which instances are on, at which operating point, with which share of the load: the least energy, cost or carbon.

    min  sum_ik idle_i n_ik + e^p_ik x^p_ik + e^d_ik x^d_ik      (watts; or dollars or grams an hour)
    s.t. sum x^p = prompt tokens/s,  sum x^d = output tokens/s
         s^p x^p + s^d x^d <= BUSY n                    (time of the instances that are on)
         s^p x^p <= min(use, 1 - step/tpot) n           (TTFT; TPOT with prompts between the steps)
         s^d x^d >= least (n - s^p x^p)                 (a batch is as large as the load makes it)
         sum_k n_ik <= count_i,  sum watts <= budget

It is linear because clock and batch are discretised: one column for each point (`points`). Idle machines cost most, so
consolidation comes first by itself and clocks second. Knows no placement: a pool is any number of equal instances.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import inf

from kvmesh.errors import InvalidArgument
from kvmesh.planner.power.points import OperatingPoint
from kvmesh.planner.solver import Program, Solution
from kvmesh.planner.world import Phase

WATTS_IN_KILOWATT = 1e3
BUSY = 0.95
"""Of an instance's time, at most."""


class Aim(StrEnum):
    """What to minimise."""

    ENERGY = "energy"
    COST = "cost"
    CARBON = "carbon"


@dataclass(frozen=True, slots=True)
class Pool:
    """`count` equal instances that are off or at one of `points`; one that is off draws `asleep_watts`.

    `balanced`: each takes prompts and outputs in the proportion of the whole demand, as under a router that spreads
    whole requests; else some may take prompts only.
    """

    name: str
    count: int
    points: tuple[OperatingPoint, ...]
    phase: Phase = Phase.MIXED
    dollars_per_hour: float = 0.0
    asleep_watts: float = 0.0
    balanced: bool = False


@dataclass(frozen=True, slots=True)
class Demand:
    """Load to serve, in tokens/s, and the TPOT to keep in seconds."""

    prompt_tokens: float
    output_tokens: float
    tpot: float = inf


@dataclass(frozen=True, slots=True)
class Prices:
    """Of energy: dollars and grams of CO2 for a kWh."""

    dollars_per_kwh: float = 0.0
    grams_per_kwh: float = 0.0


@dataclass(frozen=True, slots=True)
class Choice:
    """`on` instances of a pool at a point, and the tokens/s that all of them take together."""

    pool: str
    point: OperatingPoint
    on: int
    prompt_tokens: float
    output_tokens: float

    @property
    def watts(self) -> float:
        point = self.point
        dynamic = point.prefill_joules * self.prompt_tokens + point.decode_joules * self.output_tokens
        return point.idle_watts * self.on + dynamic


@dataclass(frozen=True, slots=True)
class Operation:
    """The answer; `bound` is proven for the objective, in its own unit."""

    choices: tuple[Choice, ...]
    watts: float
    dollars_per_hour: float
    grams_per_hour: float
    objective: float
    bound: float

    @property
    def on(self) -> Mapping[str, int]:
        counts: dict[str, int] = {}
        for choice in self.choices:
            counts[choice.pool] = counts.get(choice.pool, 0) + choice.on
        return counts

    def joules_per_token(self, demand: Demand) -> float:
        """Joules for each output token, the prompts' included."""
        return self.watts / demand.output_tokens


@dataclass(frozen=True, slots=True)
class _Columns:
    on: int
    prompt: int
    output: int


def operate(
    pools: Sequence[Pool],
    demand: Demand,
    aim: Aim = Aim.ENERGY,
    prices: Prices = Prices(),
    budget_watts: float = inf,
    time_limit: float = 10.0,
) -> Operation:
    """The cheapest way to serve `demand`.

    Raises:
        InvalidArgument: no choice serves it; says whether capacity or the budget fails first.
    """
    model = _Model(pools, demand, aim, prices, budget_watts)
    solution = model.program.solve(time_limit)
    if solution is None:
        raise InvalidArgument(_reason(pools, demand, budget_watts, time_limit))
    return model.read(solution)


class _Model:
    """The program, built column by column."""

    def __init__(self, pools: Sequence[Pool], demand: Demand, aim: Aim, prices: Prices, budget_watts: float) -> None:
        self.pools, self.aim, self.prices = pools, aim, prices
        self.ratio = demand.prompt_tokens / max(demand.output_tokens, 1e-9)
        self.asleep = sum(pool.asleep_watts * pool.count for pool in pools)
        self.program = Program()
        self.prompt_row = self.program.row(demand.prompt_tokens, demand.prompt_tokens)
        self.output_row = self.program.row(demand.output_tokens, demand.output_tokens)
        self.budget_row = self.program.row(upper=budget_watts - self.asleep)
        self.columns = [
            (pool, point, self._point(pool, count_row, point, demand.tpot))
            for pool in pools
            for count_row in [self.program.row(upper=pool.count)]
            for point in pool.points
        ]

    def _point(self, pool: Pool, count_row: int, point: OperatingPoint, tpot: float) -> _Columns:
        time_row, latency_row = self.program.row(upper=0.0), self.program.row(upper=0.0)
        batch_row = self.program.row(lower=0.0)
        ratio_row = self.program.row(0.0, 0.0) if pool.balanced else self.program.row()
        mixed = pool.phase is Phase.MIXED
        room = min(point.prefill_use, max(0.0, 1 - point.step_seconds / tpot)) if mixed else point.prefill_use
        watts = point.idle_watts - pool.asleep_watts
        on = self.program.column(
            {count_row: 1.0, time_row: -BUSY, latency_row: -room, batch_row: -point.least, self.budget_row: watts},
            -self._hourly(watts, pool.dollars_per_hour),
            pool.count,
            integer=True,
        )
        seconds = point.prefill_seconds
        prompt = self.program.column(
            {
                self.prompt_row: 1.0,
                time_row: seconds,
                latency_row: seconds,
                ratio_row: 1.0,
                batch_row: point.least * seconds,
                self.budget_row: point.prefill_joules,
            },
            -self._hourly(point.prefill_joules),
            inf if pool.phase.prefills else 0.0,
        )
        output = self.program.column(
            {
                self.output_row: 1.0,
                time_row: point.decode_seconds,
                ratio_row: -self.ratio,
                batch_row: point.decode_seconds,
                self.budget_row: point.decode_joules,
            },
            -self._hourly(point.decode_joules),
            inf if pool.phase.decodes else 0.0,
        )
        return _Columns(on, prompt, output)

    def _hourly(self, watts: float, dollars_per_hour: float = 0.0) -> float:
        """What `watts` and an instance cost, in the unit of the aim."""
        kilowatts = watts / WATTS_IN_KILOWATT
        match self.aim:
            case Aim.ENERGY:
                return watts
            case Aim.COST:
                return dollars_per_hour + kilowatts * self.prices.dollars_per_kwh
            case Aim.CARBON:
                return kilowatts * self.prices.grams_per_kwh

    def read(self, solution: Solution) -> Operation:
        choices = tuple(
            Choice(pool.name, point, on, solution.values[columns.prompt], solution.values[columns.output])
            for pool, point, columns in self.columns
            if (on := round(solution.values[columns.on]))
        )
        running = {choice.pool: 0 for choice in choices}
        for choice in choices:
            running[choice.pool] += choice.on
        asleep = sum(pool.asleep_watts * (pool.count - running.get(pool.name, 0)) for pool in self.pools)
        watts = asleep + sum(choice.watts for choice in choices)
        kilowatts = watts / WATTS_IN_KILOWATT
        rent = sum(pool.dollars_per_hour * running.get(pool.name, 0) for pool in self.pools)
        constant = self._hourly(self.asleep)
        return Operation(
            choices,
            watts,
            rent + kilowatts * self.prices.dollars_per_kwh,
            kilowatts * self.prices.grams_per_kwh,
            constant - solution.objective,
            constant - solution.bound,
        )


def _reason(pools: Sequence[Pool], demand: Demand, budget_watts: float, time_limit: float) -> str:
    """Which constraint fails first."""
    load = f"{demand.prompt_tokens:g} prompt and {demand.output_tokens:g} output tokens/s"
    if not any(pool.points for pool in pools):
        return "no operating point of any pool keeps the latency limits"
    if budget_watts < inf and _Model(pools, demand, Aim.ENERGY, Prices(), inf).program.solve(time_limit):
        least = operate(pools, demand, time_limit=time_limit).watts
        return f"the power budget of {budget_watts:g} W is too small: {load} need at least {least:.0f} W"
    count = sum(pool.count for pool in pools)
    return f"the {count} instances of {', '.join(pool.name for pool in pools)} cannot serve {load}"
