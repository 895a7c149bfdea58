"""A plan as the scheduler sees it: which worker serves which phase, and how much flow each hop carries.

Read from the JSON that `kvmesh plan --json` and `kvmesh replan` write. Worker ids of the mesh are the plan's names;
every other name stands for the coordinator. Pure: who reads the file, and when, is the router's concern.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from pydantic import BaseModel, Field, ValidationError

from kvmesh.errors import InvalidArgument
from kvmesh.scheduling.interleaved import InterleavedRoundRobin, Marks, Topology
from kvmesh.scheduling.phases import Phases
from kvmesh.types import Role

COORDINATOR = ""
Hop = tuple[str, str, float]
"""From, to, how much."""
PHASES = {"prefill": Role.PREFILL, "decode": Role.DECODE, "mixed": Role.MIXED}


class _Link(BaseModel):
    tail: str = Field(alias="from")
    head: str = Field(alias="to")
    flow_tokens_per_s: float = Field(ge=0, allow_inf_nan=False)


class _Group(BaseModel):
    phase: str
    workers: list[str] = []


class _Route(BaseModel):
    prefill: int = Field(ge=0)
    decode: int = Field(ge=0)
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)


class _Document(BaseModel):
    """What `kvmesh plan` writes has phase and links, what `kvmesh replan` writes has groups and routes among them."""

    phase: dict[str, str] = {}
    links: list[_Link] = []
    groups: list[_Group] = []
    routes: list[_Route] = []

    def phases(self) -> dict[str, str]:
        return self.phase or {worker: group.phase for group in self.groups for worker in group.workers}

    def heads(self) -> list[str]:
        """Of each group the worker that takes its requests."""
        return [group.workers[0] if group.workers else COORDINATOR for group in self.groups]


@dataclass(frozen=True, slots=True)
class ServingPlan:
    """`flows`: tokens/s from one worker to another; from COORDINATOR to where prompts begin."""

    phases: Phases = field(default_factory=Phases)
    flows: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def round_robin(self) -> RoundRobin:
        return RoundRobin(self.flows)


def parse(text: str, name: str = "the plan") -> ServingPlan:
    """
    Raises:
        InvalidArgument: it is no plan; the message names it and everything that is wrong.
    """
    try:
        document = _Document.model_validate(json.loads(text))
    except json.JSONDecodeError as error:
        raise InvalidArgument(f"{name} is not JSON: {error}") from error
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))} {e['msg']}" for e in error.errors())
        raise InvalidArgument(f"{name} is no plan: {wrong}") from error
    phases = document.phases()
    unknown = sorted({phase for phase in phases.values() if phase not in PHASES})
    if unknown or not phases:
        what = f"{', '.join(unknown)} is no phase" if unknown else "it gives nobody a phase"
        raise InvalidArgument(f"{name} is no plan: {what}")
    hops = _hops_of_links(document, phases) if document.phase else _hops_of_routes(document, name)
    flows: dict[str, dict[str, float]] = {}
    for tail, head, flow in hops:
        heads = flows.setdefault(tail, {})
        heads[head] = heads.get(head, 0.0) + flow
    return ServingPlan(Phases({worker: PHASES[phase] for worker, phase in phases.items()}), flows)


def _hops_of_links(document: _Document, phases: Mapping[str, str]) -> Iterator[Hop]:
    for link in document.links:
        if link.head in phases:
            yield link.tail if link.tail in phases else COORDINATOR, link.head, link.flow_tokens_per_s


def _hops_of_routes(document: _Document, name: str) -> Iterator[Hop]:
    """A route within one group begins and ends there."""
    heads = document.heads()
    for route in document.routes:
        if max(route.prefill, route.decode) >= len(heads):
            raise InvalidArgument(f"{name} is no plan: a route names group {max(route.prefill, route.decode)}")
        yield COORDINATOR, heads[route.prefill], route.weight
        if route.prefill != route.decode:
            yield heads[route.prefill], heads[route.decode], route.weight


class RoundRobin:
    """Helix's interleaved weighted round-robin over names, among whoever is there at the moment."""

    def __init__(self, flows: Mapping[str, Mapping[str, float]]) -> None:
        names = sorted({COORDINATOR, *flows, *(head for heads in flows.values() for head in heads)})
        self._number = {name: number for number, name in enumerate(names)}
        hops = {
            self._number[tail]: {self._number[head]: flow for head, flow in heads.items()}
            for tail, heads in flows.items()
        }
        topology = Topology(self._number[COORDINATOR], -1, {}, hops)
        self._scheduler = InterleavedRoundRobin(topology, Marks(1.0, 0.0, 0.0))

    def choose(self, tail: str, heads: list[str], work: int) -> str | None:
        """Whose turn it is after `tail`; None if the plan has no flow to any of them."""
        number = self._number.get(tail, -1)
        flows = self._scheduler.hops.get(number, {})
        ready = {n: head for head in heads if (n := self._number.get(head, -1)) in flows}
        if not ready:
            return None
        chosen = self._scheduler.choose(number, list(ready), work)
        self._scheduler.charge(number, chosen, work)
        return ready[chosen]
