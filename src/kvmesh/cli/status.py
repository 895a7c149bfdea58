"""`kvmesh status`: every process of the mesh, as the router sees it."""

from __future__ import annotations

from typing import Annotated

import typer

from kvmesh.cli.render import print_whole, status_json, status_table
from kvmesh.cli.talk import AddressOption, JsonOption, connect
from kvmesh.client import WorkerStatus
from kvmesh.errors import KvmeshError


def status(
    address: AddressOption = None,
    json: JsonOption = False,
    check: Annotated[
        bool, typer.Option("--check", help="Run the integrity check of every pool; fail on a bad one.")
    ] = False,
) -> None:
    """Show each service with its load, blocks (used/cached/total), leases, what codecs save and store, reads of tiers
    (hits/misses and bytes), and what was missed (chunks/replicas)."""
    with connect(address) as client:
        workers = client.status(check)
    if json:
        typer.echo(status_json(workers))
    else:
        print_whole(status_table(workers, check))
    if check and (bad := [worker for worker in workers if not _sound(worker)]):
        raise KvmeshError(f"the check failed for {', '.join(worker.info.worker_id for worker in bad)}")


def _sound(worker: WorkerStatus) -> bool:
    return worker.statistics is not None and not worker.statistics.integrity_errors
