"""`kvmesh plan --deploy DIR`: says what was written, and what of the plan a mesh cannot do yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmesh.cli.render import notes

if TYPE_CHECKING:
    from kvmesh.planner.world import Host

SHOWN = 5


def write_deployment(
    directory: Path, document: Mapping[str, Any], hosts: Iterable[Host], model: str, layers: int
) -> None:
    """The files of `kvmesh.planner.deployment_files` for the plan in `document`.

    Raises:
        InvalidArgument: the plan cannot be deployed.
    """
    from kvmesh.planner import deployment_files  # Here, not above: it needs yaml.

    deployed = deployment_files.deployment(document, hosts, model, layers)
    for path in deployment_files.write(directory, deployed):
        notes().print(f"wrote {path}", soft_wrap=True, highlight=False)
    if partial := deployed.partial:
        names = ", ".join(partial[:SHOWN]) + (", …" if len(partial) > SHOWN else "")
        notes().print(
            f"note: a worker loads all {layers} layers; {names} would hold fewer in the plan (kept as labels)",
            soft_wrap=True,
            highlight=False,
        )
