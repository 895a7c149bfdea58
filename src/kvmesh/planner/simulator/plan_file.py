"""What a plan of `kvmesh plan --json` would be as a deployment: every group of hosts an instance."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kvmesh.errors import InvalidArgument
from kvmesh.planner import catalogue, task
from kvmesh.planner.groups.routing import Estimator
from kvmesh.planner.groups.trial import deployment
from kvmesh.planner.plan_file import read_plan
from kvmesh.planner.simulator.deployment import Deployment
from kvmesh.planner.speeds import SpeedBook
from kvmesh.planner.world import Slo

CHUNK = 512
"""Prompt tokens beside decodes in one iteration of a mixed group's stage."""
ANY = Slo(3600.0, 3600.0)
"""Where the plan was made without objectives."""


def planned(path: Path) -> Deployment:
    """The plan's groups on the cluster that it was made for.

    Raises:
        InvalidArgument: it is no plan, or cluster and plan do not fit; the message names what is wrong.
    """
    if not path.is_file():
        raise InvalidArgument(f"there is no plan {path}")
    plan = read_plan(path)
    wanted, inputs = catalogue.workload(plan.inputs.workload), plan.inputs
    slo = Slo(inputs.slo_ttft_seconds or ANY.ttft, inputs.slo_tpot_seconds or ANY.tpot, inputs.slo_attainment)
    cluster, model = catalogue.cluster(inputs.cluster), catalogue.model(inputs.model)
    work = replace(wanted, rate=inputs.rate or wanted.rate)
    speeds = SpeedBook(model, catalogue.accelerators())
    made = task.build(cluster, model, work, slo, speeds, inputs.objective, inputs.kv_ratio)
    return deployment(Estimator(made), plan.placed(cluster), CHUNK)
