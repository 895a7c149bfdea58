"""What is known by name: accelerators, models with their profiles, clusters, workloads. Shipped as package data.

A cluster or workload may also be a file. Everything read here is validated; nothing is computed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, RootModel, field_validator

from kvmesh.errors import InvalidArgument, NotFound
from kvmesh.planner import helix_files
from kvmesh.planner.cluster_file import Accelerator, Name, Positive, Section, read_cluster, validated
from kvmesh.planner.latency.distserve import DistServeLatency
from kvmesh.planner.profiles import MachineProfile, ModelProfile
from kvmesh.planner.workload_file import read_lengths, read_lengths_as_workload, read_workload
from kvmesh.planner.world import Cluster, Workload

DATA = Path(__file__).parent / "data"
HELIX = DATA / "helix"
AZURE = DATA / "azure"
WORKLOADS = {
    # Helix rounds the means of the conversation trace (763 and 232) so; its published tables depend on it.
    "azure-conv": (750, 240, AZURE / "conv_lengths.csv"),
    "azure-code": (1379, 28, AZURE / "code_lengths.csv"),
}

Line = tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]]
Pairs = Annotated[list[tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]]], Field(min_length=2)]


class MachineSection(Section):
    typical_layers: Annotated[int, Field(ge=1)]
    packed_layers: Annotated[int, Field(ge=1)]
    initial_speed: Positive
    kv_entries: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    prompt_ms: Pairs
    decode_ms: Pairs
    prompt_batch: Annotated[int, Field(ge=1)] = 1
    decode_batch: tuple[Annotated[int, Field(ge=1)], ...] = ()

    @field_validator("prompt_ms", "decode_ms")
    @classmethod
    def _sorted(cls, points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        if any(a[0] >= b[0] for a, b in pairwise(points)):
            raise ValueError("batch sizes must increase")
        return points

    def profile(self) -> MachineProfile:
        return MachineProfile(
            self.typical_layers,
            self.packed_layers,
            self.initial_speed,
            tuple(self.kv_entries),
            tuple(self.prompt_ms),
            tuple(self.decode_ms),
            self.prompt_batch,
            tuple(self.decode_batch),
        )


class FitSection(Section):
    """DistServe's lines in ms: constant, and factors of (tokens, squared lengths) or (context, batch)."""

    prompt_ms: Line
    small_ms: Line
    large_ms: Line
    large_batch: Annotated[int, Field(ge=1)]

    def latency(self) -> DistServeLatency:
        prompt, small, large = (
            (a / 1e3, b / 1e3, c / 1e3) for a, b, c in (self.prompt_ms, self.small_ms, self.large_ms)
        )
        return DistServeLatency(prompt, small, large, self.large_batch)


class ModelSection(Section):
    """`machines` are profiled by the layer, `fits` as a whole; what is in neither is estimated from its datasheet."""

    name: Name
    layers: Annotated[int, Field(ge=1)]
    bytes_per_layer: Positive
    token_bytes: Positive
    activation_bytes: Positive
    kv_bytes: Positive
    weights_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    machines: Mapping[str, MachineSection] = Field(default_factory=dict)
    fits: Mapping[str, FitSection] = Field(default_factory=dict)

    def profile(self) -> ModelProfile:
        fields = {key: getattr(self, key) for key in type(self).model_fields if key not in ("machines", "fits")}
        machines = {name: machine.profile() for name, machine in self.machines.items()}
        return ModelProfile(**fields, machines=machines, fits={name: fit.latency() for name, fit in self.fits.items()})


def accelerators() -> Mapping[str, Accelerator]:
    path = DATA / "accelerators.json"
    return validated(RootModel[dict[str, Accelerator]], json.loads(path.read_text()), str(path)).root


def model(name: str) -> ModelProfile:
    """A model by its name in the catalogue, or a profile file (.json)."""
    path = _find(name, model_names(), "model", ".json")
    return read_model(path)


def read_model(path: Path) -> ModelProfile:
    try:
        document: Any = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path} is not JSON: {error}") from None
    return validated(ModelSection, document, str(path)).profile()


def cluster(name: str) -> Cluster:
    """A cluster by its name in the catalogue, a YAML file, or a cluster file of Helix (.ini)."""
    path = _find(name, cluster_names(), "cluster", ".ini", ".yaml", ".yml")
    if path.suffix == ".ini":
        return _equipped(helix_files.read_cluster(path, HELIX / "machine_profiles.ini"))
    return read_cluster(path, accelerators())


def _equipped(cluster: Cluster) -> Cluster:
    """Helix names machines (T4x2); here each host gets the accelerators of that name, and their watts."""
    known = {entry.profile: (name, entry) for name, entry in accelerators().items()}
    hosts = []
    for host in cluster.hosts:
        profile, _, count = host.machine.partition("x")
        name, entry = known[profile]
        number = int(count or 1)
        watts, idle = number * entry.watts, number * entry.resting_watts
        hosts.append(replace(host, accelerator=name, accelerators=number, watts=watts, idle_watts=idle))
    return replace(cluster, hosts=tuple(hosts))


def workload(name: str) -> Workload:
    """A workload by its name, a CSV file of requests (input_tokens,output_tokens), or YAML with rate and SLOs."""
    if name in WORKLOADS:
        inputs, outputs, lengths = WORKLOADS[name]
        return Workload(name, inputs, outputs, read_lengths(lengths))
    path = _find(name, {}, "workload", ".csv", ".yaml", ".yml", known=list(WORKLOADS))
    return read_lengths_as_workload(path) if path.suffix == ".csv" else read_workload(path)


def model_names() -> dict[str, Path]:
    return {path.stem: path for folder in (HELIX, DATA / "distserve") for path in sorted(folder.glob("*.json"))}


def cluster_names() -> dict[str, Path]:
    helix = {path.stem: path for path in sorted(HELIX.glob("*.ini")) if path.stem != "machine_profiles"}
    return helix | {path.stem: path for path in sorted((DATA / "clusters").glob("*.yaml"))}


def _find(name: str, known_files: Mapping[str, Path], what: str, *suffixes: str, known: Sequence[str] = ()) -> Path:
    if name in known_files:
        return known_files[name]
    path = Path(name)
    if path.suffix in suffixes and path.is_file():
        return path
    names = ", ".join(known or known_files)
    raise NotFound(f"no {what} {name!r}: known are {names}, or name a file ({', '.join(suffixes)})")
