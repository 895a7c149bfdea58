"""Figures 7 and 8: routing by prefixes, and early rejection, on Mooncake's conversation trace in modelled time.

    python bench/scheduling.py --traces DIRECTORY [--figure 7] [--requests N] [--json FILE] [--plot FILE]

Figure 7: mean time to first token, and the share of prompt tokens that were not computed, by routing policy. `random`
and `load only` (the shortest queue) ignore prefixes, `cache-aware` is Mooncake's estimate with what each instance has,
`kvmesh` the same with prefixes fetched from a shared store where that is sooner, and work counted twice, for those who
come later. Figure 8: 2.5 times the trace's rate with objectives on both phases; `late` means refused after the prompt
was computed for nothing, `missed` served too slowly. Swings: the standard deviation of what is queued for prefill
(seconds) and of what decodes (sequences on an instance), and `phase` their correlation, about the mean of two minutes.

The policies are the router's own objects, the iteration schedulers the engines'. There are 16 instances; their latency
is that of LLaMA-2-70B on eight A800, its speed chosen so that `load only` is about as slow as published (5.27 s).
Arrivals are spread over the trace's ticks of 3 s with a fixed seed. In figure 7 a block of 16 simulated tokens stands
for a trace block of 512, lengths and latency scaled alike.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from statistics import StatisticsError, correlation, fmean, pstdev, quantiles

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvmesh.bench.workload import MOONCAKE_BLOCK, read_trace
from kvmesh.engine.api import Admitted
from kvmesh.planner.latency.distserve import DistServeLatency
from kvmesh.planner.simulator import Arrival, Deployment, Instance, Links, Outcome, Phase
from kvmesh.planner.simulator.prompts import block_names
from kvmesh.planner.simulator.server import Server
from kvmesh.planner.simulator.simulation import Journey, Simulation
from kvmesh.planner.world import Link
from kvmesh.scheduling.admission import Refused
from kvmesh.scheduling.distserve import DistServe
from kvmesh.scheduling.fleet import Fleet
from kvmesh.scheduling.gate import CurrentLoad, Gate, Late, PredictedLoad
from kvmesh.scheduling.load import Assignment
from kvmesh.scheduling.policy import Identity, Policy, Prompt, Slo
from kvmesh.scheduling.predictor import Profile
from kvmesh.scheduling.prefix_aware import PrefixAware
from kvmesh.scheduling.prefix_index import PrefixIndex
from kvmesh.types import BLOCK_TOKENS, WorkerInfo

TRACE = "mooncake_conversation_trace.jsonl"
SEED = 0
SCALE = MOONCAKE_BLOCK // BLOCK_TOKENS
SPEED = 1.35
"""Time of a prompt relative to 8 x A800 at half their peak: what makes `load only` as slow as Mooncake says."""
PROMPT = (0.02 * SPEED, 1.1e-4 * SPEED, 1.05e-9 * SPEED)
STEP = (0.02, 2.6e-8, 5e-5)
KV_BYTES = 327_680
LINK = Link(25e9, 0.001)
AMPLE = 12_000_000
"""Tokens of KV that an instance keeps: eight of them hold the whole trace."""
OVERLOAD, OVERLOAD_SLO = 2.5, Slo(ttft=30.0, tpot=0.024)
PREFILLERS, DECODERS = 12, 4
"""In figure 8: about equally short of prefill and of decode."""
TREND = 120
PUBLISHED = {"random": 19.65, "load only": 5.27, "cache-aware": 3.58, "kvmesh": 3.07}


def latency(scale: int) -> DistServeLatency:
    a, b, c = PROMPT
    fixed, per_context, per_sequence = STEP
    step = (fixed, per_context * scale, per_sequence)
    return DistServeLatency((a, b * scale, c * scale * scale), step, step)


def fleet(scale: int, cache: int) -> Fleet:
    """A fleet whose instances were profiled."""
    model = latency(scale)
    fetch = (LINK.seconds, KV_BYTES * scale / LINK.bytes_per_s)
    return Fleet(PrefixIndex(cache // MOONCAKE_BLOCK), usual=Profile(model.prompt, model.small, fetch, measured=True))


def deployment(scale: int, cache: int, prefillers: int, decoders: int) -> Deployment:
    model, budget = latency(scale), 8192 // scale
    prefill = [Instance(f"prefill-{i}", Phase.PREFILL, model, cache // scale, budget) for i in range(prefillers)]
    decode = [Instance(f"decode-{i}", Phase.DECODE, model, 4 * cache // scale, budget) for i in range(decoders)]
    return Deployment([*prefill, *decode], Links(LINK), KV_BYTES * scale)


# Figure 7 --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Anyone(DistServe):
    """Baseline: any prefill worker, each as likely."""

    def prefill(
        self, workers: Iterable[WorkerInfo], prompt: Prompt, now: float, avoid: Collection[Identity] = ()
    ) -> Assignment | None:
        pool = self.fleet.phases.prefill(workers)
        return DistServe.prefill(self, [random.Random(f"{SEED} {prompt.key}").choice(pool)], prompt, now, avoid)


class StoreSimulation(Simulation):
    """A simulation whose prefill instances fetch from a store what others have computed, if the policy counts on it."""

    def __init__(self, deployment: Deployment, policy: Policy, slo: Slo, progress: Callable[[int], None]) -> None:
        super().__init__(deployment, policy, slo, progress=progress)
        self._stored: set[int] = set()
        self._fetches: set[int] = set()

    def describe(self, arrival: Arrival, number: int) -> Prompt:
        names = block_names(arrival)
        stored = next((i for i, name in enumerate(names) if name not in self._stored), len(names))
        return Prompt(arrival.prompt_tokens, names, stored * BLOCK_TOKENS, number, slo=self.slo)

    def _prefill(self, journey: Journey, assignment: Assignment) -> None:
        fetched = journey.prompt.tokens - round(assignment.prompt_tokens)
        if fetched <= assignment.hit_tokens:
            super()._prefill(journey, assignment)
            return
        self._fetches.add(journey.number)
        server = self.servers[assignment.worker.worker_id]
        journey.served.prefill = server.instance.name
        server.add(journey.number, journey.arrival, prefill_only=True, stored=True)

    def on_admitted(self, server: Server, event: Admitted) -> None:
        super().on_admitted(server, event)
        journey = self.journeys.get(event.request_id)
        if journey is not None and journey.number in self._fetches and journey.decode is None:
            self._fetch(journey, server, event.cached_tokens)

    def _fetch(self, journey: Journey, server: Server, cached: int) -> None:
        """From anywhere in the pool of stores: only the instance's own port is a bottleneck."""
        end = max(cached, min(journey.prompt.stored_tokens, journey.prompt.tokens - 1))
        size = self.deployment.wire_bytes(end - cached)
        when = self.network.transfer(server.instance, server.instance, size, self.now) if end > cached else self.now
        journey.served.hit_tokens = end
        self.at(when, lambda: server.start(journey.number, end))

    def _first_token(self, journey: Journey, server: Server) -> None:
        super()._first_token(journey, server)
        self._stored.update(journey.prompt.hashes)


@dataclass(frozen=True, slots=True)
class Routing:
    """One policy's figures: seconds, and shares of prompt tokens."""

    policy: str
    mean_ttft: float
    p50_ttft: float
    p99_ttft: float
    hit: float
    published: float


POLICIES: dict[str, tuple[Callable[[Fleet], Policy], type[Simulation]]] = {
    "random": (Anyone, Simulation),
    "load only": (DistServe, Simulation),
    "cache-aware": (lambda fleet: PrefixAware(fleet, regard=0.0), Simulation),
    "kvmesh": (PrefixAware, StoreSimulation),
}


def scaled(path: Path, limit: int | None) -> list[Arrival]:
    """The trace with a block of 16 tokens for each of 512."""
    found = []
    for arrival in read_trace(path, limit=limit, seed=SEED):
        tokens = max(1, round(arrival.prompt_tokens / SCALE))
        names = tuple(segment.id for segment in arrival.prompt)
        found.append(Arrival(arrival.at, tokens, arrival.output_tokens, names, hash_tokens=BLOCK_TOKENS))
    return found


def ceiling(arrivals: Sequence[Arrival]) -> float:
    """Share of prompt tokens that came before, had everything been kept from the moment it arrived."""
    seen: set[int] = set()
    reused = 0
    for arrival in arrivals:
        names = block_names(arrival)
        reused += BLOCK_TOKENS * next((i for i, name in enumerate(names) if name not in seen), len(names))
        seen.update(names)
    return reused / sum(arrival.prompt_tokens for arrival in arrivals)


def route(name: str, arrivals: Sequence[Arrival], progress: Callable[[int], None]) -> Routing:
    make, simulation = POLICIES[name]
    run = simulation(deployment(SCALE, AMPLE, 8, 8), make(fleet(SCALE, AMPLE)), Slo(), progress=progress)
    requests = run.run(arrivals).requests
    times = [request.ttft for request in requests]
    cuts = quantiles(times, n=100)
    hit = sum(r.hit_tokens for r in requests) / sum(r.prompt_tokens for r in requests)
    return Routing(name, fmean(times), cuts[49], cuts[98], hit, PUBLISHED[name])


def show_routing(rows: Sequence[Routing], most: float, console: Console) -> None:
    base = next(row for row in rows if row.policy == "load only")
    title = f"Figure 7: Mooncake conversation trace; {most:.1%} of the prompt tokens can be reused"
    table = Table(title=title, box=SIMPLE, padding=(0, 0, 0, 1))
    for column in ("policy", "TTFT s", "P50", "P99", "×", "published", "×", "reused", "possible"):
        table.add_column(column, justify="left" if column == "policy" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.policy, f"{row.mean_ttft:.2f}", f"{row.p50_ttft:.2f}", f"{row.p99_ttft:.1f}",
            f"{row.mean_ttft / base.mean_ttft:.2f}", f"{row.published:.2f}", f"{row.published / base.published:.2f}",
            f"{row.hit:.1%}", f"{row.hit / most:.0%}",
        )  # fmt: skip
    console.print(table)


# Figure 8 --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Watching:
    """A gate that also reads the pools' loads, once a second at most."""

    gate: Gate
    seconds: list[float]
    prefill: list[float]
    decode: list[float]

    def check(
        self, fleet: Fleet, workers: Sequence[WorkerInfo], prompt: Prompt, now: float, prefilled: bool
    ) -> Refused | None:
        if not self.seconds or now >= self.seconds[-1] + 1:
            pools = fleet.phases.prefill(workers), fleet.phases.decode(workers)
            self.seconds.append(now)
            self.prefill.append(fmean(fleet.load(worker).wait(now) for worker in pools[0]))
            self.decode.append(fmean(fleet.load(worker).sequences for worker in pools[1]))
        return self.gate.check(fleet, workers, prompt, now, prefilled)


@dataclass(frozen=True, slots=True)
class Rejection:
    """One gate's figures: requests, seconds of prompt computing for nothing, and how the loads swing."""

    gate: str
    requests: int
    refused: int
    refused_late: int
    wasted_seconds: float
    missed: int
    goodput: float
    prefill_swing: float
    decode_swing: float
    phase: float


GATES: dict[str, Callable[[], Gate]] = {
    "none": Late,
    "current": CurrentLoad,
    "predicted": PredictedLoad,
}


def plain(path: Path, limit: int | None) -> list[Arrival]:
    """The trace at OVERLOAD times its rate, nothing shared."""
    return [
        Arrival(arrival.at, arrival.prompt_tokens, arrival.output_tokens)
        for arrival in read_trace(path, speedup=OVERLOAD, limit=limit, seed=SEED)
    ]


def reject(name: str, arrivals: Sequence[Arrival], progress: Callable[[int], None]) -> tuple[Rejection, Watching]:
    watch = Watching(GATES[name](), [], [], [])
    policy = PrefixAware(fleet(1, AMPLE), watch)
    policy.fleet.mean_decode_seconds = 10.0
    outcome = Simulation(deployment(1, AMPLE // 8, PREFILLERS, DECODERS), policy, OVERLOAD_SLO, progress=progress).run(
        arrivals
    )
    return _rejection(name, outcome, watch), watch


def _rejection(name: str, outcome: Outcome, watch: Watching) -> Rejection:
    requests, model = outcome.requests, latency(1)
    refused = [request for request in requests if request.refused]
    late = [request for request in refused if request.first_token < inf]
    served = [request for request in requests if not request.refused]
    missed = sum(not request.meets(OVERLOAD_SLO) for request in served)
    span = max(request.arrival for request in requests) or 1.0
    return Rejection(
        name,
        len(requests),
        len(refused),
        len(late),
        sum(model.prefill([request.prompt_tokens]) for request in late),
        missed,
        (len(served) - missed) / span,
        _swing(watch.prefill),
        _swing(watch.decode),
        _phase(watch.prefill, watch.decode),
    )


def _fast(loads: Sequence[float]) -> list[float]:
    """The load less its mean over TREND readings around: the trace's own ups and downs are slower."""
    half = TREND // 2
    windows = (loads[max(0, i - half) : i + half + 1] for i in range(len(loads)))
    return [load - fmean(window) for load, window in zip(loads, windows, strict=True)]


def _swing(loads: Sequence[float]) -> float:
    return pstdev(_fast(loads)) if loads else 0.0


def _phase(one: Sequence[float], other: Sequence[float]) -> float:
    try:
        return correlation(_fast(one), _fast(other))
    except StatisticsError:
        return 0.0


def show_rejection(rows: Sequence[Rejection], console: Console) -> None:
    slo = OVERLOAD_SLO
    what = f"{rows[0].requests} requests at {OVERLOAD:g} x the rate, TTFT {slo.ttft:g} s, TPOT {slo.tpot * 1e3:g} ms"
    table = Table(title=f"Figure 8: {what}", box=SIMPLE, padding=(0, 0, 0, 1))
    for column in ("gate", "refused", "late", "wasted s", "missed", "good/s", "swing P", "swing D", "phase"):
        table.add_column(column, justify="left" if column == "gate" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.gate, str(row.refused), str(row.refused_late), f"{row.wasted_seconds:.0f}",
            str(row.missed), f"{row.goodput:.2f}", f"{row.prefill_swing:.2f}", f"{row.decode_swing:.2f}",
            f"{row.phase:+.2f}",
        )  # fmt: skip
    console.print(table)


def plot(watches: dict[str, Watching], path: Path) -> None:
    """Both pools' loads over time, one panel for each gate, on equal axes."""
    import matplotlib.pyplot as plt

    size = (9, 2.2 * len(watches))
    figure, panels = plt.subplots(len(watches), 1, figsize=size, sharex=True, sharey=True, squeeze=False)
    top = max(max(watch.decode) for watch in watches.values())
    for (name, watch), panel in zip(watches.items(), panels[:, 0], strict=True):
        panel.plot(watch.seconds, watch.prefill, label="prefill: seconds queued", lw=0.8)
        panel.plot([], [], color="tab:orange", label="decode: sequences on an instance")
        twin = panel.twinx()
        twin.plot(watch.seconds, watch.decode, color="tab:orange", lw=0.8)
        twin.set_ylim(0, 1.1 * top)
        panel.set_title(f"gate: {name}", loc="left", fontsize=10)
        panel.set_ylabel("seconds")
        twin.set_ylabel("sequences")
    panels[0, 0].legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, fontsize=8, frameon=False)
    panels[-1, 0].set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True, help=f"directory with {TRACE}")
    parser.add_argument("--figure", type=int, choices=(7, 8), help="only this one (default both)")
    parser.add_argument("--requests", type=int, help="only so many requests of the trace")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--plot", type=Path, help="draw the loads of figure 8")
    args = parser.parse_args()
    result: dict[str, object] = {}
    path, console = args.traces / TRACE, Console()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        if args.figure != 8:
            arrivals = scaled(path, args.requests)
            task = progress.add_task("routing", total=len(POLICIES) * len(arrivals))
            rows = [route(name, arrivals, lambda _: progress.advance(task)) for name in POLICIES]
            most = ceiling(arrivals)
            show_routing(rows, most, console)
            result["routing"] = {"ceiling": most, "policies": [asdict(row) for row in rows]}
        if args.figure != 7:
            arrivals = plain(path, args.requests)
            task = progress.add_task("rejection", total=len(GATES) * len(arrivals))
            found = {name: reject(name, arrivals, lambda _: progress.advance(task)) for name in GATES}
            show_rejection([row for row, _ in found.values()], console)
            result["rejection"] = [asdict(row) for row, _ in found.values()]
            if args.plot:
                plot({name: watch for name, (_, watch) in found.items()}, args.plot)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
