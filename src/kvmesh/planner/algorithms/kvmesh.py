"""Our own: many ways to form groups, one estimate to compare them, and doubt before the choice.

1. Candidates: groups of several hosts a stage (Helix's placement, once for all hosts and once for each phase), equal
   shapes in balance (DistServe), hosts in pools (Splitwise), and clusters of fast links (ThunderServe).
2. Tabu search from the best partition, with the transportation program as its measure; then, in short, for speeds that
   are off, and for the plan that is good at all of these.
3. The best candidates are simulated. Of them, the one that regrets least when throughputs are off.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import chain

from kvmesh.errors import InvalidArgument
from kvmesh.planner.algorithms import distserve_high, thunderserve
from kvmesh.planner.groups.instances import racks
from kvmesh.planner.groups.neighbours import Partition, clusters
from kvmesh.planner.groups.networks import network
from kvmesh.planner.groups.parts import assignments, layout
from kvmesh.planner.groups.pools import pooled
from kvmesh.planner.groups.robust import Hedged, regrets, truths
from kvmesh.planner.groups.routing import Estimator
from kvmesh.planner.groups.search import Candidate, Search
from kvmesh.planner.groups.trial import attained
from kvmesh.planner.world import Group, Phase

NETWORKS_SHARE, SEARCH_SHARE, DOUBT_SHARE = 0.15, 0.25, 0.4
"""Of the time; simulations have the rest."""
ERROR = 0.25
"""Throughputs are off by up to so much, either way."""
SCENARIOS, STEPS, HEDGES = 4, 20, 3
"""Other speeds that are searched for, tabu steps for each, and plans for all of them that are kept."""
SPLITS = 5
"""Shares of the hosts that are tried for prefill."""
FINALISTS = 8
REQUESTS = 150
"""Of the simulation that a finalist goes through, at the rate that it is estimated to serve."""
CLOSE = 0.85
"""A finalist is worth so much of the best."""


def candidates(estimator: Estimator, seconds: float, seed: int) -> list[Candidate]:
    """The finalists in order of growing trust, so that the choice comes last."""
    started = time.monotonic()
    found = finalists(estimator, seconds, seed)
    # Without an SLO there is nothing that a simulation could tell.
    if estimator.task.objective != "goodput":
        return found[::-1]
    return _by_trust(estimator, found, started + seconds, seed)


def finalists(estimator: Estimator, seconds: float, seed: int, error: float = ERROR) -> list[Candidate]:
    """The best that were found, best first: for the speeds as given, and in view of what they may turn out to be."""
    began = time.monotonic()
    search = Search(estimator, began + seconds * (NETWORKS_SHARE + SEARCH_SHARE), seed)
    made = chain(_pools(search), _networks(estimator, began + seconds * NETWORKS_SHARE))
    pool = [search.weigh(groups) for groups in made]
    search.run([*thunderserve.starts(estimator), *_shapes(estimator)])
    pool += search.known.values()
    if search.tops and estimator.task.objective == "goodput":
        pool += [search.weigh(groups) for groups in _hedges(search, seconds * DOUBT_SHARE, error)]
    return _best(pool)


def _hedges(search: Search, seconds: float, error: float) -> Iterator[tuple[Group, ...]]:
    """The best plan for each of some other speeds, then the plans that are good for all of them."""
    began, best = time.monotonic(), search.tops[-1]
    start, truths_known = _partition(best.groups), [(search.estimator, best.worth[0])]
    for number, truth in enumerate(truths(search.estimator.task, error, SCENARIOS, search.seed), 1):
        doubted = Search(Estimator(truth), began + seconds * number / (2 * SCENARIOS), search.seed)
        if tops := doubted.run([start], STEPS):
            truths_known.append((doubted.estimator, tops[-1].worth[0]))
            yield tops[-1].groups
    hedged = Hedged(search.estimator, began + seconds, search.seed, truths=truths_known)
    yield from (top.groups for top in hedged.run([start])[-HEDGES:])


def _networks(estimator: Estimator, deadline: float) -> Iterator[tuple[Group, ...]]:
    """Hosts that compute fast for what they read prefill, the others decode; or all do both."""
    task = estimator.task
    hosts = sorted(range(len(task.hosts)), key=lambda host: (-thunderserve.arithmetic(task, host), host))
    if len(hosts) < 2:
        return
    each = (deadline - time.monotonic()) / (2 * SPLITS + 2)
    if shared := layout(task, each):
        yield from assignments(estimator, shared, deadline)
    if mixed := network(task, hosts, Phase.MIXED, each):
        yield (mixed,)
    for share in range(1, SPLITS + 1):
        cut = round(len(hosts) * share / (SPLITS + 1))
        if time.monotonic() > deadline or not 0 < cut < len(hosts):
            return
        parts = (network(task, hosts[:cut], Phase.PREFILL, each), network(task, hosts[cut:], Phase.DECODE, each))
        if all(parts):
            yield tuple(group for group in parts if group)


def _pools(search: Search) -> Iterator[tuple[Group, ...]]:
    """Of groups as small as links and memory allow."""
    smallest = [search.deducer.group(pool, Phase.MIXED) for pool in clusters(search.estimator.task)]
    groups = [group for group in smallest if group]
    yield from pooled(search.estimator, groups, lambda: time.monotonic() < search.deadline)


def _shapes(estimator: Estimator) -> Iterator[Partition]:
    """DistServe's instances, judged by the estimate; and the same shape for everything."""
    for rack in racks(estimator.task):
        try:
            groups = distserve_high.place(estimator, rack, lambda group, estimate: estimate)
        except InvalidArgument:
            continue
        if groups:
            yield _partition(groups)
            yield _partition([Group(Phase.MIXED, group.shards) for group in groups])


def _partition(groups: Sequence[Group]) -> Partition:
    return frozenset(
        (frozenset((shard.host, number) for shard in group.shards for number in shard.accelerators), group.phase)
        for group in groups
    )


def _best(pool: list[Candidate]) -> list[Candidate]:
    """Each different: half of them the best by worth, the others the latest that are close."""
    close: dict[tuple[Group, ...], Candidate] = {}
    best = max((one.worth[0] for one in pool), default=0.0)
    for candidate in pool:
        if candidate.routing.rates and candidate.worth[0] >= CLOSE * best:
            close.setdefault(candidate.groups, candidate)
    ranked = sorted(close.values(), key=lambda one: one.worth, reverse=True)
    latest = [one for one in list(close.values())[::-1] if one not in ranked[: FINALISTS // 2]]
    return ranked[: FINALISTS // 2] + latest[: FINALISTS // 2]


def _by_trust(estimator: Estimator, found: list[Candidate], deadline: float, seed: int) -> list[Candidate]:
    """Largest regret first. The best by estimate are simulated, as long as there is time; the rest is left out."""
    trust = []
    for candidate in found:
        served = attained(estimator, candidate.groups, candidate.routing.total, REQUESTS)
        trust.append(min(1.0, served / estimator.task.slo.attainment))
        if time.monotonic() > deadline:
            break
    known = found[: len(trust)]
    regret = regrets(estimator.task, [one.groups for one in known], ERROR, seed=seed, trust=trust)
    order = sorted(range(len(known)), key=lambda number: (-regret.worst[number], -number))
    return [known[number] for number in order]
