"""Goodput: the highest request rate at which enough requests meet their objectives (DistServe, OSDI 2024)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import floor, sqrt

from kvmesh.planner.simulator.deployment import Arrival, Deployment
from kvmesh.planner.simulator.simulation import Progress, Simulation
from kvmesh.scheduling.policy import Policy, Slo

TOLERANCE = 0.02
"""Relative width of the interval in which the search stops."""
LOWEST_RATE, HIGHEST_RATE = 1e-3, 1e6
ROUNDING = 1e-9


def goodput(
    make_deployment: Callable[[], Deployment],
    arrivals_at: Callable[[float], Sequence[Arrival]],
    policy_factory: Callable[[], Policy],
    slo: Slo,
    attainment: float = 0.9,
    *,
    start: float = 1.0,
    tolerance: float = TOLERANCE,
    progress: Progress | None = None,
) -> float:
    """Requests/s, 0 if even LOWEST_RATE is too much.

    `arrivals_at` should draw the same requests for every rate, only closer together: then attainment falls with the
    rate but for small steps.
    """

    def good(rate: float) -> bool:
        return attains(make_deployment(), policy_factory(), [arrivals_at(rate)], slo, attainment, progress)

    return highest_rate(good, start, tolerance)


def attains(
    deployment: Deployment,
    policy: Policy,
    workloads: Sequence[Sequence[Arrival]],
    slo: Slo,
    attainment: float,
    progress: Progress | None = None,
) -> bool:
    """Whether that share of all requests of the workloads, each served from the start, meets both objectives.

    Stops as soon as it cannot any more. The policy keeps what it has learnt from one workload to the next.
    """
    left = floor((1 - attainment) * sum(map(len, workloads)) + ROUNDING)
    for arrivals in workloads:
        outcome = Simulation(deployment, policy, slo, progress=progress, allowed_misses=left).run(arrivals)
        left -= sum(not request.meets(slo) for request in outcome.requests)
        if left < 0:
            return False
    return True


def highest_rate(
    good: Callable[[float], bool], start: float, tolerance: float = TOLERANCE, factor: float = 2.0
) -> float:
    """The highest rate that is good, if rates below a good one are: steps of `factor` from `start`, then bisection.

    The better the guess `start`, the smaller a `factor` pays. 0 if even LOWEST_RATE is too much.
    """
    low = high = start
    if good(start):
        while high <= HIGHEST_RATE and good(high := high * factor):
            low = high
    else:
        while low >= LOWEST_RATE and not good(low := low / factor):
            high = low
        if low < LOWEST_RATE:
            return 0.0
    while high > low * (1 + tolerance):
        middle = sqrt(low * high)
        low, high = (middle, high) if good(middle) else (low, middle)
    return low
