"""`--policy` and `--plan`: what the router of a mesh is told of scheduling, checked before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvmesh.errors import InvalidArgument

PolicyOption = Annotated[
    str | None, typer.Option("--policy", help="Who serves a request: placement (default), hybrid, chunked, …")
]
PlanOption = Annotated[
    Path | None, typer.Option("--plan", help="What `kvmesh plan --json` wrote: phases and weights, read on change.")
]


def policy_settings(policy: str | None, plan: Path | None, mixed: int = 0) -> dict[str, str]:
    """Who serves what, as settings of the router; workers that can do both are best used by the hybrid policy.

    Raises:
        InvalidArgument: there is no policy of that name, or no plan there.
    """
    from kvmesh.scheduling.policies import check_name
    from kvmesh.scheduling.serving_plan import parse

    settings = {"KVMESH_POLICY": check_name(policy)} if policy else {}
    if plan is not None:
        parse(_text(plan), f"the plan {plan}")
        settings |= {"KVMESH_PLAN": str(plan.resolve())}
        settings.setdefault("KVMESH_POLICY", "plan")
    return {"KVMESH_POLICY": "hybrid"} | settings if mixed else settings


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"the plan {path} cannot be read: {error}") from error
