"""The policies by name: the one place to choose.

placement      time to first token from measured rates, prefixes included; needs no calibration (default)
distserve      shortest prefill queue, least loaded decode, pulled hand-over
splitwise      two pools that join the shortest queue, and a mixed one that borrows
chunked        colocation: prompts are computed in chunks where they decode
hybrid         disaggregated or colocated, request by request
prefix-aware   calibrated time to first token with prefixes, and regard for those who wait
plan           the flows of a plan, by interleaved weighted round-robin
ucb            prefix-aware, with bandit exploration on top
"""

from __future__ import annotations

from collections.abc import Callable

from kvmesh.errors import InvalidArgument
from kvmesh.scheduling.base import FleetPolicy
from kvmesh.scheduling.chunked import Chunked
from kvmesh.scheduling.distserve import DistServe
from kvmesh.scheduling.fleet import Fleet
from kvmesh.scheduling.gate import CurrentLoad, Gate, Late, Open, PredictedLoad
from kvmesh.scheduling.hybrid import Hybrid
from kvmesh.scheduling.placement import Placement
from kvmesh.scheduling.plan_weights import PlanWeights
from kvmesh.scheduling.policy import Policy
from kvmesh.scheduling.prefix_aware import PrefixAware
from kvmesh.scheduling.splitwise import Splitwise
from kvmesh.scheduling.ucb import Exploring

DEFAULT = "placement"
GATES: dict[str, Callable[[], Gate]] = {
    "open": Open,
    "late": Late,
    "current": CurrentLoad,
    "predicted": PredictedLoad,
}
_FLEET_POLICIES: dict[str, Callable[[Fleet, Gate], FleetPolicy]] = {
    "placement": Placement,
    "distserve": DistServe,
    "splitwise": Splitwise,
    "chunked": Chunked,
    "hybrid": Hybrid,
    "prefix-aware": PrefixAware,
    "plan": PlanWeights,
}
NAMES = (*_FLEET_POLICIES, "ucb")


def make_policy(name: str, fleet: Fleet | None = None, gate: Gate | None = None) -> Policy:
    """A policy of its own.

    Raises:
        InvalidArgument: there is none of that name; the message names those there are.
    """
    check_name(name)
    fleet, gate = fleet or Fleet(), gate or Open()
    if name == "ucb":
        return Exploring(PrefixAware(fleet, gate))
    return _FLEET_POLICIES[name](fleet, gate)


def check_name(name: str) -> str:
    """
    Raises:
        InvalidArgument: there is no policy of that name.
    """
    if name not in NAMES:
        raise InvalidArgument(f"there is no policy {name!r}; there is {', '.join(NAMES)}")
    return name
