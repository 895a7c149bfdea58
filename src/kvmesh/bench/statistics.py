"""From what was observed of each request to percentiles, throughput and goodput. Pure.

All times are seconds on one clock. TTFT and E2E count from the *scheduled* arrival, so that a generator or a router
that falls behind cannot hide it (coordinated omission). Goodput after DistServe (OSDI '24): requests per second that
meet every SLO; a request that was rejected or failed meets none.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

OK = "OK"
QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True)
class Record:
    """One request as the client saw it. `arrivals`: (when, tokens) of each message that brought tokens."""

    scheduled: float
    sent: float
    ended: float
    status: str
    prompt_tokens: int = 0
    cached_tokens: int = 0
    arrivals: tuple[tuple[float, int], ...] = ()

    @property
    def output_tokens(self) -> int:
        return sum(tokens for _, tokens in self.arrivals)

    @property
    def ttft(self) -> float | None:
        """Time to first token."""
        return self.arrivals[0][0] - self.scheduled if self.arrivals else None

    @property
    def tpot(self) -> float | None:
        """Mean time per output token after the first message; None if there was but one."""
        later = self.output_tokens - self.arrivals[0][1] if self.arrivals else 0
        return (self.arrivals[-1][0] - self.arrivals[0][0]) / later if later else None

    @property
    def e2e(self) -> float:
        return self.ended - self.scheduled

    @property
    def gaps(self) -> list[float]:
        """Times between messages (inter-token latency as a reader feels it: coalesced tokens come at once)."""
        return [after - before for (before, _), (after, _) in itertools.pairwise(self.arrivals)]


@dataclass(frozen=True, slots=True)
class Slo:
    """Bounds in seconds; None: no bound."""

    ttft: float | None = None
    tpot: float | None = None

    def meets_ttft(self, record: Record) -> bool:
        good = record.ttft is not None and (self.ttft is None or record.ttft <= self.ttft)
        return record.status == OK and good

    def meets_tpot(self, record: Record) -> bool:
        """A request of one message has no TPOT to miss."""
        return record.status == OK and (self.tpot is None or record.tpot is None or record.tpot <= self.tpot)


@dataclass(frozen=True, slots=True)
class Report:
    """Figures of one run; rates are per second, latencies in seconds as {"p50": …, "p90": …, "p99": …, "mean": …}."""

    requests: int
    statuses: dict[str, int]
    duration: float
    request_rate: float
    prompt_token_rate: float
    output_token_rate: float
    cached_share: float
    ttft: dict[str, float]
    tpot: dict[str, float]
    itl: dict[str, float]
    e2e: dict[str, float]
    send_lag: dict[str, float]
    ttft_attainment: float
    tpot_attainment: float
    attainment: float
    goodput: float


def percentile(values: Sequence[float], quantile: float) -> float:
    """By linear interpolation between the closest ranks (numpy's default); NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    position = quantile * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summary(values: Sequence[float]) -> dict[str, float]:
    """Quantiles and mean; empty for no values."""
    if not values:
        return {}
    quantiles = {f"p{round(quantile * 100)}": percentile(values, quantile) for quantile in QUANTILES}
    return {**quantiles, "mean": math.fsum(values) / len(values)}


def evaluate(records: Sequence[Record], slo: Slo) -> Report:
    """The report of a run, over all its requests. Rates are over first scheduled arrival to last end.

    Raises:
        ValueError: there are no records.
    """
    good = [record for record in records if record.status == OK]
    duration = max(record.ended for record in records) - min(record.scheduled for record in records)
    prompt_tokens = sum(record.prompt_tokens for record in good)
    met_ttft, met_tpot = ([check(r) for r in records] for check in (slo.meets_ttft, slo.meets_tpot))
    met = sum(a and b for a, b in zip(met_ttft, met_tpot, strict=True))
    return Report(
        requests=len(records),
        statuses=dict(Counter(record.status for record in records)),
        duration=duration,
        request_rate=_rate(len(good), duration),
        prompt_token_rate=_rate(prompt_tokens, duration),
        output_token_rate=_rate(sum(record.output_tokens for record in records), duration),
        cached_share=_rate(sum(record.cached_tokens for record in good), prompt_tokens),
        ttft=summary([r.ttft for r in good if r.ttft is not None]),
        tpot=summary([r.tpot for r in good if r.tpot is not None]),
        itl=summary([gap for r in good for gap in r.gaps]),
        e2e=summary([r.e2e for r in good]),
        send_lag=summary([r.sent - r.scheduled for r in records]),
        ttft_attainment=sum(met_ttft) / len(records),
        tpot_attainment=sum(met_tpot) / len(records),
        attainment=met / len(records),
        goodput=_rate(met, duration),
    )


def _rate(amount: float, over: float) -> float:
    return amount / over if over > 0 else 0.0
