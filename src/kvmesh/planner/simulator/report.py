"""What people and programs read of a simulation: percentiles, use of instances, attainment. Draws nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf
from typing import Any

from kvmesh.bench.statistics import summary
from kvmesh.planner.simulator.outcome import Outcome, Served
from kvmesh.scheduling.policy import Slo

Values = Callable[[Served], float]
LATENCIES: Mapping[str, Values] = {
    "TTFT": lambda request: request.ttft,
    "TPOT": lambda request: request.tpot,
    "E2E": lambda request: request.finish - request.arrival,
}


@dataclass(frozen=True, slots=True)
class Point:
    """One rate of an attainment curve: shares of all requests, each bound for itself and both together."""

    rate: float
    ttft: float
    tpot: float
    both: float


def latencies(outcome: Outcome) -> dict[str, dict[str, float]]:
    """Seconds as {"TTFT": {"p50": …, "p90": …, "p99": …, "mean": …}, …}, of the requests that finished."""
    finished = [request for request in outcome.requests if request.finish < inf]
    return {name: summary([value(request) for request in finished]) for name, value in LATENCIES.items()}


def point(outcome: Outcome, slo: Slo, rate: float) -> Point:
    """Where the outcome lies on the curve."""
    first, later = Slo(ttft=slo.ttft), Slo(tpot=slo.tpot)
    return Point(rate, outcome.attainment(first), outcome.attainment(later), outcome.attainment(slo))


def duration(outcome: Outcome) -> float:
    """Seconds from the first arrival to the last event of a request."""
    ends = [request.finish for request in outcome.requests if request.finish < inf]
    return max(ends, default=0.0) - min((request.arrival for request in outcome.requests), default=0.0)


def totals(outcome: Outcome) -> dict[str, float]:
    """Requests and tokens per second over the whole run, hits as a share of prompt tokens."""
    seconds = max(duration(outcome), 1e-9)
    finished = [request for request in outcome.requests if request.finish < inf]
    prompts = sum(request.prompt_tokens for request in finished)
    return {
        "requests": float(len(outcome.requests)),
        "refused": float(sum(bool(request.refused) for request in outcome.requests)),
        "requests_per_s": len(finished) / seconds,
        "prompt_tokens_per_s": prompts / seconds,
        "output_tokens_per_s": sum(request.output_tokens for request in finished) / seconds,
        "hit_share": sum(request.hit_tokens for request in finished) / max(1, prompts),
        "transferred_bytes": outcome.transferred_bytes,
        "simulated_seconds": duration(outcome),
        "seconds": outcome.seconds,
        "events_per_s": outcome.events / max(outcome.seconds, 1e-9),
    }


def refusals(outcome: Outcome) -> dict[str, int]:
    """How many requests were refused for each reason."""
    reasons = [request.refused.split(",")[0] for request in outcome.requests if request.refused]
    return {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}


def document(outcome: Outcome, slo: Slo, rate: float, curve: Sequence[Point], details: bool = True) -> dict[str, Any]:
    """The run as JSON; times in seconds. `details`: every request, too."""
    seconds = duration(outcome)
    found: dict[str, Any] = {
        "slo": {name: bound for name, bound in asdict(slo).items() if bound < inf},
        "attainment": asdict(point(outcome, slo, rate)),
        "latencies": latencies(outcome),
        "totals": totals(outcome),
        "refused": refusals(outcome),
        "instances": [asdict(one) | {"utilisation": one.busy / max(seconds, 1e-9)} for one in outcome.instances],
        "curve": [asdict(one) for one in curve],
    }
    if details:
        found["requests"] = [_finite(asdict(request)) for request in outcome.requests]
    return found


def _finite(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: what never came is null."""
    return {name: None if value == inf else value for name, value in fields.items()}
