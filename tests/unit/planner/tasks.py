"""Small tasks for the algorithms that form groups: clusters, models and loads of a few hosts, and an oracle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hypothesis import strategies as st

from kvmesh.planner.cluster_file import Accelerator
from kvmesh.planner.groups.deduction import Deducer, Pool
from kvmesh.planner.groups.routing import Estimator
from kvmesh.planner.groups.worth import worth
from kvmesh.planner.latency.distserve import DistServeLatency
from kvmesh.planner.profiles import ModelProfile
from kvmesh.planner.speeds import SpeedBook
from kvmesh.planner.task import Task
from kvmesh.planner.world import SINK, SOURCE, Cluster, Host, Link, Phase, Slo, Workload

LAYERS = 8
SLO = Slo(2.0, 0.2)
LENGTHS = tuple((prompt, output) for prompt in (100, 400, 900) for output in (20, 80))
CHAT = Workload("chat", 467, 50, LENGTHS)


def accelerator(name: str, gigabytes: float = 10.0) -> Accelerator:
    return Accelerator(
        profile=name,
        memory_gigabytes=gigabytes,
        memory_gigabytes_per_s=1000,
        fp16_teraflops=100,
        peer_gigabytes_per_s=50,
        watts=300,
        source="a test",
    )


def speed(factor: float = 1.0) -> DistServeLatency:
    """A prompt of 400 takes 50 ms and a token 20 ms, times the factor."""
    decode = (0.018 * factor, 1e-6 * factor, 2e-4 * factor)
    return DistServeLatency((0.01 * factor, 1e-4 * factor, 1e-9 * factor), decode, decode)


def model(layers: int = LAYERS, **speeds: float) -> ModelProfile:
    """4 GB of weights in all. `speeds`: machine names and how slow they are."""
    fits = {name: speed(factor) for name, factor in (speeds or {"fast": 1.0, "fastx2": 0.6, "slow": 3.0}).items()}
    return ModelProfile("small", layers, 4e9 / layers, 2, 4096, {}, 4096, 0.9, fits)


def cluster(hosts: Sequence[tuple[str, int]], bytes_per_s: float = 5e9, prices: Sequence[float] = ()) -> Cluster:
    """Hosts as (accelerator, how many), all linked."""
    made = tuple(
        Host(f"h{i}", name, 10e9 * count, 5e9, name, count, "default", price, 300.0 * count, 45.0 * count)
        for i, ((name, count), price) in enumerate(zip(hosts, prices or [1.0] * len(hosts), strict=True))
    )
    ends = range(len(made))
    inner = {(u, v): Link(bytes_per_s, 1e-4) for u in ends for v in ends if u != v}
    outer = {edge: Link(1e9, 1e-4) for u in ends for edge in ((SOURCE, u), (u, SINK))}
    return Cluster("test", made, inner | outer)


def task(
    hosts: Sequence[tuple[str, int]],
    *,
    slo: Slo = SLO,
    workload: Workload = CHAT,
    objective: str = "goodput",
    bytes_per_s: float = 5e9,
    prices: Sequence[float] = (),
    profile: ModelProfile | None = None,
) -> Task:
    profile = profile or model()
    names = dict.fromkeys(name for name, _ in hosts)
    book = SpeedBook(profile, {name: accelerator(name) for name in names})
    return Task(cluster(hosts, bytes_per_s, prices), profile, workload, slo, book, objective)


def partitions(units: Sequence[tuple[int, int]]) -> Iterator[list[list[tuple[int, int]]]]:
    """All ways to put accelerators into groups."""
    if not units:
        yield []
        return
    first, rest = units[0], units[1:]
    for parts in partitions(rest):
        yield [[first], *parts]
        for i, part in enumerate(parts):
            yield [*parts[:i], [first, *part], *parts[i + 1 :]]


def best_by_force(wanted: Task) -> float:
    """Requests/s of the best partition and phases, each group deduced alone."""
    estimator = Estimator(wanted)
    deducer = Deducer(estimator)
    units = [(host, number) for host, each in enumerate(wanted.hosts) for number in range(each.accelerators)]
    best = 0.0
    for parts in partitions(units):
        pools: list[Pool] = [frozenset(part) for part in parts]
        for phases in _phases(len(pools)):
            groups = [deducer.group(pool, phase) for pool, phase in zip(pools, phases, strict=True)]
            if all(groups):
                best = max(best, worth(estimator, [group for group in groups if group])[1][0])
    return best


def _phases(count: int) -> Iterator[tuple[Phase, ...]]:
    if not count:
        yield ()
        return
    for rest in _phases(count - 1):
        for phase in Phase:
            yield (phase, *rest)


@st.composite
def small_tasks(draw: st.DrawFn) -> Task:
    """Two to four accelerators of one or two kinds, links of several widths."""
    hosts = draw(st.lists(st.sampled_from([("fast", 1), ("slow", 1), ("fast", 2)]), min_size=2, max_size=3))
    width = draw(st.sampled_from([5e9, 5e7]))
    tpot = draw(st.sampled_from([0.03, 0.2, 1.0]))
    return task(hosts[:2] if ("fast", 2) in hosts[:2] else hosts, slo=Slo(2.0, tpot), bytes_per_s=width)
