"""What is known by name: accelerators, models with their profiles, clusters, workloads. Shipped as package data.

A cluster or workload may also be a file. Everything read here is validated; nothing is computed.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from pydantic import Field, RootModel, field_validator

from kvmesh.errors import InvalidArgument, NotFound
from kvmesh.planner import helix_files
from kvmesh.planner.cluster_file import Accelerator, Name, Positive, Section, read_cluster, validated
from kvmesh.planner.profiles import MachineProfile, ModelProfile
from kvmesh.planner.world import Cluster, Workload

DATA = Path(__file__).parent / "data"
HELIX = DATA / "helix"
WORKLOADS = (
    # Helix rounds the means of the conversation trace (763 and 232) so; its published tables depend on it.
    Workload("azure-conv", 750, 240),
    Workload("azure-code", 1379, 28),
)

Pairs = Annotated[list[tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]]], Field(min_length=2)]


class MachineSection(Section):
    typical_layers: Annotated[int, Field(ge=1)]
    packed_layers: Annotated[int, Field(ge=1)]
    initial_speed: Positive
    kv_entries: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    prompt_ms: Pairs
    decode_ms: Pairs

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
        )


class ModelSection(Section):
    name: Name
    layers: Annotated[int, Field(ge=1)]
    bytes_per_layer: Positive
    token_bytes: Positive
    activation_bytes: Positive
    machines: Annotated[dict[str, MachineSection], Field(min_length=1)]

    def profile(self) -> ModelProfile:
        fields = {key: getattr(self, key) for key in type(self).model_fields if key != "machines"}
        return ModelProfile(**fields, machines={name: machine.profile() for name, machine in self.machines.items()})


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
        return helix_files.read_cluster(path, HELIX / "machine_profiles.ini")
    return read_cluster(path, accelerators())


def workload(name: str) -> Workload:
    """A workload by its name, or a CSV file of requests: input_tokens,output_tokens."""
    known = {entry.name: entry for entry in WORKLOADS}
    return known[name] if name in known else _read_workload(_find(name, {}, "workload", ".csv", known=list(known)))


def _read_workload(path: Path) -> Workload:
    try:
        rows = [(float(r["input_tokens"]), float(r["output_tokens"])) for r in csv.DictReader(path.open())]
        inputs, outputs = (fmean(column) for column in zip(*rows, strict=True))
    except (KeyError, TypeError, ValueError):
        raise InvalidArgument(f"{path} is not a CSV file with numbers under input_tokens,output_tokens") from None
    if min(inputs, outputs) <= 0:
        raise InvalidArgument(f"{path} has a mean of {inputs:g} input and {outputs:g} output tokens; both must be > 0")
    return Workload(path.stem, inputs, outputs)


def model_names() -> dict[str, Path]:
    return {path.stem: path for path in sorted(HELIX.glob("*.json"))}


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
