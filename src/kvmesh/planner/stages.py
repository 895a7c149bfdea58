"""Pipelines of aligned stages: each layer belongs to one stage, and all hosts of a stage hold all its layers.

For a wanted flow F this is a small integer program over *patterns*: (layers, hosts of each kind) whose throughputs
add up to F, as few hosts as suffice. Its linear relaxation is nearly tight, so HiGHS solves it in milliseconds where
dynamic programming over host counts needs seconds. Hosts come in groups of equals; several regions in a row add
crossings, where w_out hosts hand over to w_in hosts and w_out·w_in links must carry F. No host is named here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import ceil

from kvmesh.planner.solver import Program

EPSILON = 1e-9
MAX_PATTERNS = 2000
"""Of each number of layers; more are left out: plans of hundreds of unlike hosts are valid but maybe not the best."""

Table = tuple[float, ...]
Counts = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Region:
    """Hosts with fast links among themselves, by kind: T(1), T(2), ... and how many there are."""

    tables: tuple[Table, ...]
    counts: Counts


@dataclass(frozen=True, slots=True)
class Stage:
    """`layers` consecutive layers on `hosts[kind]` hosts of each kind of its region."""

    layers: int
    hosts: Counts

    @property
    def width(self) -> int:
        return sum(self.hosts)


@dataclass(slots=True)
class _Roles:
    """Columns of one region: what they stand for, and the rows that its crossings added."""

    columns: list[tuple[int, Stage]] = field(default_factory=list)
    entries: list[tuple[int, Stage]] = field(default_factory=list)
    exits: list[tuple[int, Stage]] = field(default_factory=list)


def patterns(region: Region, flow: float, width: int = 1) -> Iterator[Stage]:
    """All stages of at least `width` hosts that carry `flow`, none of which could spare its last host."""
    for layers in range(1, max(map(len, region.tables), default=0) + 1):
        rates = [(table[layers - 1] if len(table) >= layers else 0.0, kind) for kind, table in enumerate(region.tables)]
        # Fastest first: then the last host chosen is the slowest, and without it the stage falls short.
        kinds = [(rate, kind) for rate, kind in sorted(rates, reverse=True) if rate > 0]
        covers = _covers(kinds, region.counts, flow * (1 - EPSILON), width)
        for chosen in islice(covers, MAX_PATTERNS):
            hosts = [0] * len(region.counts)
            for kind, number in chosen:
                hosts[kind] = number
            yield Stage(layers, tuple(hosts))


def _covers(
    kinds: Sequence[tuple[float, int]], counts: Counts, need: float, width: int
) -> Iterator[list[tuple[int, int]]]:
    if need <= 0 and width <= 0:
        yield []
        return
    if not kinds:
        return
    (rate, kind), rest = kinds[0], kinds[1:]
    for number in range(min(counts[kind], max(ceil(need / rate), width)) + 1):
        for tail in _covers(rest, counts, need - number * rate, width - number):
            yield [(kind, number), *tail]


def pipeline(
    regions: Sequence[Region], crossings: Sequence[float], layers: int, flow: float, time_limit: float
) -> list[list[Stage]] | None:
    """Stages for each region in turn that hold all `layers` and carry `flow`; None if there are none (or none in time).

    `crossings[c]` is what one link between a host of region c and one of region c + 1 carries, tokens/s.
    """
    program = Program()
    total = program.row(float(layers), float(layers))
    roles = [_Roles() for _ in regions]
    for position, region in enumerate(regions):
        _add_region(program, roles[position], region, flow, total, _widths(regions, crossings, position, flow))
    for position, capacity in enumerate(crossings):
        sides = regions[position], regions[position + 1]
        _add_crossing(program, roles[position].exits, roles[position + 1].entries, _options(*sides, flow / capacity))
    solution = program.solve(time_limit)
    return [_ordered(part, solution.values) for part in roles] if solution else None


def _options(out: Region, into: Region, links: float) -> list[tuple[int, int]]:
    """Smallest (w_out, w_in) with enough links between them."""
    widths = ((w, max(1, ceil(links / w - EPSILON))) for w in range(1, sum(out.counts) + 1))
    feasible = [(w_out, w_in) for w_out, w_in in widths if w_in <= sum(into.counts)]
    return [pair for i, pair in enumerate(feasible) if not i or pair[1] < feasible[i - 1][1]]


def _widths(regions: Sequence[Region], crossings: Sequence[float], position: int, flow: float) -> tuple[set[int], ...]:
    """Widths that a region's entry and exit stages may need; empty where the pipeline begins or ends."""
    before, after = position > 0, position < len(crossings)
    entry = _options(regions[position - 1], regions[position], flow / crossings[position - 1]) if before else []
    leave = _options(regions[position], regions[position + 1], flow / crossings[position]) if after else []
    return {width for _, width in entry}, {width for width, _ in leave}


def _add_region(
    program: Program, roles: _Roles, region: Region, flow: float, total: int, widths: tuple[set[int], ...]
) -> None:
    machines = [program.row(upper=float(count)) for count in region.counts]
    first, last = (program.row(1.0, 1.0) if side else None for side in widths)

    def add(stage: Stage, *rows: int | None) -> tuple[int, Stage]:
        entries = {row: float(number) for row, number in zip(machines, stage.hosts, strict=True) if number}
        entries |= {row: 1.0 for row in rows if row is not None} | {total: float(stage.layers)}
        return program.column(entries, integer=True), stage

    entry, leave = (_wide(region, flow, side) for side in widths)
    roles.columns += [add(stage) for stage in patterns(region, flow)]
    roles.entries += [add(stage, first) for stage in entry]
    roles.exits += [add(stage, last) for stage in leave]
    if first is not None and last is not None:
        # A region may be one stage, entered and left by the same hosts.
        both = [add(stage, first, last) for stage in dict.fromkeys([*entry, *leave])]
        roles.entries += both
        roles.exits += both


def _wide(region: Region, flow: float, widths: set[int]) -> list[Stage]:
    """Stages for a crossing, without repetition."""
    return list(dict.fromkeys(stage for width in sorted(widths) for stage in patterns(region, flow, width)))


def _add_crossing(
    program: Program,
    exits: Sequence[tuple[int, Stage]],
    entries: Sequence[tuple[int, Stage]],
    options: Sequence[tuple[int, int]],
) -> None:
    """One of the width pairs holds: Σ width(exit) >= Σ w_out·option, and likewise for the entry."""
    out, into, one = program.row(lower=0.0), program.row(lower=0.0), program.row(1.0, 1.0)
    for w_out, w_in in options:
        program.column({out: -float(w_out), into: -float(w_in), one: 1.0}, integer=True)
    for row, columns in ((out, exits), (into, entries)):
        for column, stage in columns:
            program.entries[column] = {**program.entries[column], row: float(stage.width)}


def _ordered(roles: _Roles, values: Sequence[float]) -> list[Stage]:
    """Entry first, exit last."""
    used = [(column, stage) for column, stage in roles.entries if values[column] > 0.5][:1]
    leave = [(column, stage) for column, stage in roles.exits if values[column] > 0.5][:1]
    inner = [stage for column, stage in roles.columns for _ in range(round(values[column]))]
    tail = [stage for column, stage in leave if (column, stage) not in used]
    return [*(stage for _, stage in used), *inner, *tail]
