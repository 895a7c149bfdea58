"""Where the slow links are: hosts grouped into regions, and pipelines of stages turned into hosts with layers.

A region is a set of hosts joined by links that no placement could fill. Hosts of one region with equal throughputs
are interchangeable, except for their links: `settling` chooses among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from kvmesh.planner.settling import Team, settle
from kvmesh.planner.stages import Region, Stage
from kvmesh.planner.world import Problem, Span

MAX_REGIONS = 6


@dataclass(frozen=True, slots=True)
class Layout:
    """Regions, and the hosts of each by kind: `members[region][kind]`."""

    regions: tuple[Region, ...]
    members: tuple[tuple[tuple[int, ...], ...], ...]

    def hosts(self, region: int) -> list[int]:
        return [host for kind in self.members[region] for host in kind]

    def part(self, number: int, parts: int) -> Layout:
        """Every `parts`-th host of each kind, from `number` on; regions without such hosts are left out."""
        dealt = [(region, tuple(k[number::parts] for k in kinds)) for region, kinds in self._zipped()]
        kept = [(region, kinds) for region, kinds in dealt if any(kinds)]
        regions = tuple(Region(region.tables, tuple(map(len, kinds))) for region, kinds in kept)
        return Layout(regions, tuple(kinds for _, kinds in kept))

    def _zipped(self) -> Iterator[tuple[Region, tuple[tuple[int, ...], ...]]]:
        return zip(self.regions, self.members, strict=True)


def divide(problem: Problem, flow: float) -> Layout:
    """Regions of hosts whose links all carry `flow`; narrower ones count as well where there were too many regions."""
    usable = [host for host, table in enumerate(problem.throughput) if table]
    widths = sorted({min(c, flow) for (u, v), c in problem.capacity.items() if min(u, v) >= 0}, reverse=True)
    divisions = (_cliques(problem, usable, width) for width in widths)
    # With few links no division is small: then one region stands for all, and the evaluator sorts out what works.
    parts = next((parts for parts in divisions if len(parts) <= MAX_REGIONS), [usable])
    groups = [_by_table(problem, part) for part in parts]
    regions = tuple(Region(tuple(kinds), tuple(map(len, kinds.values()))) for kinds in groups)
    return Layout(regions, tuple(tuple(map(tuple, kinds.values())) for kinds in groups))


def _cliques(problem: Problem, hosts: Sequence[int], width: float) -> list[list[int]]:
    """Each host joins the first region to all of whose hosts it has links of `width`, both ways."""
    parts: list[list[int]] = []
    for host in hosts:
        links = ((part, [(host, peer)[::way] for peer in part for way in (1, -1)]) for part in parts)
        fitting = (part for part, edges in links if all(problem.capacity.get((u, v), 0.0) >= width for u, v in edges))
        part = next(fitting, None)
        if part is None:
            parts.append([host])
        else:
            part.append(host)
    return parts


def _by_table(problem: Problem, hosts: Sequence[int]) -> dict[tuple[float, ...], list[int]]:
    kinds: dict[tuple[float, ...], list[int]] = {}
    for host in hosts:
        kinds.setdefault(problem.throughput[host], []).append(host)
    return kinds


def crossing_links(problem: Problem, layout: Layout, out: int, into: int) -> list[float]:
    """Tokens/s of every link from region `out` to region `into`, widest first."""
    pairs = ((u, v) for u in layout.hosts(out) for v in layout.hosts(into))
    return sorted((problem.capacity.get(pair, 0.0) for pair in pairs), reverse=True)


def place_stages(
    problem: Problem, layout: Layout, order: Sequence[int], pipeline: Sequence[Sequence[Stage]], flow: float
) -> dict[int, Span]:
    """Names the hosts of every stage, region by region in `order`, joined by links that carry `flow` where possible.

    Spare hosts join the weakest stage they fit.
    """
    free = {region: [list(kind) for kind in layout.members[region]] for region in order}
    teams = [
        Team(region, stage.layers, [free[region][kind].pop() for kind, n in enumerate(stage.hosts) for _ in range(n)])
        for region, stages in zip(order, pipeline, strict=True)
        for stage in stages
    ]
    spare = [Team(region, 0, [host for kind in kinds for host in kind]) for region, kinds in free.items()]
    settle(problem, teams, spare, flow)
    spans: dict[int, Span] = {}
    first = 0
    for team in teams:
        spans |= dict.fromkeys(team.hosts, (first, first + team.layers))
        first += team.layers
    return spans | _spare(problem, spans, {host for team in spare for host in team.hosts})


def _spare(problem: Problem, spans: Mapping[int, Span], hosts: set[int]) -> dict[int, Span]:
    rates: dict[Span, float] = {}
    for host, span in spans.items():
        rates[span] = rates.get(span, 0.0) + problem.throughput[host][span[1] - span[0] - 1]
    added: dict[int, Span] = {}
    for host in sorted(hosts):
        fitting = [span for span in rates if span[1] - span[0] <= problem.max_layers(host)]
        if fitting:
            span = min(fitting, key=lambda s: (rates[s], s))
            rates[span] += problem.throughput[host][span[1] - span[0] - 1]
            added[host] = span
    return added
