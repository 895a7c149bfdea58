"""Writes what deploys a plan: a layer over the compose file, values for the Helm chart, and the plan for the router.

Each node of the plan (a host, or some accelerators of one) becomes one worker under the node's name, with its phase and
accelerators; its region and layers become labels. Knows neither Docker nor Kubernetes beyond the names of their fields.
A worker loads every layer: where a plan spreads the model over hosts, `partial` names those that would hold less.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kvmesh.errors import InvalidArgument
from kvmesh.planner.world import Host, Span

PLAN, COMPOSE, VALUES = "plan.json", "compose.plan.yaml", "values.plan.yaml"
MOUNTED = "/etc/kvmesh/plan.json"
MODULES = {phase: f"kvmesh_{phase}" for phase in ("prefill", "decode", "mixed")}
KEY_LENGTH = 40


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker of the mesh. `key` names it where letters are few (DNS), `name` is its id."""

    key: str
    name: str
    host: str
    phase: str
    span: Span
    accelerators: int
    region: str

    @property
    def labels(self) -> dict[str, str]:
        layers = f"{self.span[0]}-{self.span[1] - 1}"
        return {"kvmesh.dev/layers": layers, "kvmesh.dev/region": self.region}


@dataclass(frozen=True, slots=True)
class Deployment:
    """What is written: the plan's document, its workers, KVMESH_* settings of all of them, and the model's name."""

    document: Mapping[str, Any]
    workers: tuple[Worker, ...]
    model: str
    layers: int
    settings: Mapping[str, str]

    @property
    def partial(self) -> list[str]:
        """Names of workers that the plan gives only some layers."""
        return [worker.name for worker in self.workers if worker.span != (0, self.layers)]


def deployment(
    document: Mapping[str, Any], hosts: Iterable[Host], model: str, layers: int, settings: Mapping[str, str] = {}
) -> Deployment:
    """From what `kvmesh plan --json` writes, and the cluster's hosts.

    Raises:
        InvalidArgument: two hosts have names that cannot be told apart, or a phase that no service computes.
    """
    known = {host.name: host for host in hosts}
    shards = _shards(document)
    workers = tuple(
        _worker(name, document["phase"][name], (span[0], span[1]), known, shards.get(name, {}))
        for name, span in document["placement"].items()
    )
    _check(workers)
    return Deployment(document, workers, model, layers, settings)


def _shards(document: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Nodes of a plan with groups are its shards, in order."""
    shards = [shard for group in document.get("groups", ()) for shard in group["shards"]]
    names = list(document["placement"])
    return dict(zip(names, shards, strict=True)) if len(shards) == len(names) else {}


def _worker(name: str, phase: str, span: Span, hosts: Mapping[str, Host], shard: Mapping[str, Any]) -> Worker:
    key = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:KEY_LENGTH].strip("-")
    host = hosts.get(shard.get("host", name))
    accelerators = len(shard["accelerators"]) if "accelerators" in shard else host.accelerators if host else 0
    return Worker(
        key=key,
        name=name,
        host=host.name if host else name,
        phase=phase,
        span=span,
        accelerators=accelerators if host and host.accelerator else 0,
        region=host.region if host else "default",
    )


def _check(workers: Iterable[Worker]) -> None:
    seen: dict[str, str] = {}
    for worker in workers:
        if worker.phase not in MODULES:
            raise InvalidArgument(f"host {worker.name} has phase {worker.phase!r}: there are {', '.join(MODULES)}")
        if worker.key in seen or not worker.key:
            raise InvalidArgument(
                f"hosts {seen.get(worker.key, '')} and {worker.name} would have one name in a cluster"
            )
        seen[worker.key] = worker.name


def write(directory: Path, deployed: Deployment) -> list[Path]:
    """The three files, in a folder that is made if need be."""
    directory.mkdir(parents=True, exist_ok=True)
    plan = directory.resolve() / PLAN
    contents = {
        PLAN: json.dumps(deployed.document, indent=1) + "\n",
        COMPOSE: _text(compose(deployed, plan), f"docker compose -f deploy/compose/compose.yaml -f {COMPOSE} up"),
        VALUES: _text(values(deployed), f"helm install mesh deploy/helm/kvmesh -f {VALUES} --set-file plan={PLAN}"),
    }
    for name, text in contents.items():
        (directory / name).write_text(text)
    return [directory / name for name in contents]


def compose(deployed: Deployment, plan: Path) -> dict[str, Any]:
    """A layer over deploy/compose/compose.yaml: its scaled workers give way to the plan's."""
    scaled = {"deploy": {"replicas": 0}}
    router = {"environment": {"KVMESH_PLAN": MOUNTED}, "volumes": [f"{plan}:{MOUNTED}:ro"]}
    workers = {f"worker-{worker.key}": _compose_worker(worker, deployed) for worker in deployed.workers}
    return {"services": {"prefill": scaled, "decode": dict(scaled), "router": router, **workers}}


def _compose_worker(worker: Worker, deployed: Deployment) -> dict[str, Any]:
    service: dict[str, Any] = {
        "image": "kvmesh-engine:${KVMESH_VERSION}",
        "command": [MODULES[worker.phase]],
        "environment": {
            "KVMESH_REDIS_URL": "redis://redis:6379/0",
            "KVMESH_MODEL": deployed.model,
            "KVMESH_DRAIN_GRACE": "10",
            **deployed.settings,
            "KVMESH_WORKER_ID": worker.name,
        },
        "labels": worker.labels,
        "depends_on": {
            "redis": {"condition": "service_healthy"},
            "model": {"condition": "service_completed_successfully"},
        },
        "volumes": ["models:/var/cache/kvmesh:ro"],
        "restart": "unless-stopped",
        "stop_grace_period": "20s",
        "read_only": True,
        "tmpfs": ["/tmp"],
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
    }
    if worker.accelerators:
        device = {"driver": "nvidia", "count": worker.accelerators, "capabilities": ["gpu"]}
        service["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
    return service


def values(deployed: Deployment) -> dict[str, Any]:
    """Over the chart's own values. Null takes a default worker away."""
    return {
        "model": deployed.model,
        "settings": dict(deployed.settings),
        "workers": {
            "prefill": None,
            "decode": None,
            **{worker.key: _values_worker(worker) for worker in deployed.workers},
        },
    }


def _values_worker(worker: Worker) -> dict[str, Any]:
    """A host of the cluster carries the label kvmesh.dev/host with the plan's name of it."""
    return {
        "role": worker.phase,
        "replicas": 1,
        "workerId": worker.name,
        "accelerators": worker.accelerators,
        "nodeSelector": {"kvmesh.dev/host": worker.host},
        "labels": worker.labels,
    }


def _text(content: Mapping[str, Any], usage: str) -> str:
    body = yaml.safe_dump(content, sort_keys=False, width=110)
    return f"# Written by `kvmesh plan --deploy`.\n#\n#   {usage}\n{body}"
