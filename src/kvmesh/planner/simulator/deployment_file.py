"""Reads what is to be simulated from YAML: instances by phase and accelerator, the model, links. All faults at once.

name: eight-a100
model: opt-13b                  # as in `kvmesh plan --model`
instances:
  - {name: prefill, phase: prefill, accelerator: A100-80G, replicas: 3}
  - {name: own, phase: decode, profile: measured.json}             # what `kvmesh profile` wrote; beside this file
links: {gigabytes_per_s: 25, milliseconds: 0.05}
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field

from kvmesh.errors import InvalidArgument, NotFound
from kvmesh.planner import catalogue
from kvmesh.planner.cluster_file import GIGA, LinkSection, Name, PairSection, Positive, Section, load_yaml, validated
from kvmesh.planner.latency import Latency, measured
from kvmesh.planner.profiles import ModelProfile
from kvmesh.planner.simulator.deployment import Deployment, HandOver, Instance, Links
from kvmesh.planner.speeds import KV_SHARE, SpeedBook
from kvmesh.planner.world import Link, Phase

FOLDER = catalogue.DATA / "deployments"
Count = Annotated[int, Field(ge=1)]
Fault = tuple[str, str]


class InstanceSection(Section):
    """`replicas` equal instances. Either an accelerator, `tensor_parallel` of them together, or a measured profile."""

    name: Name
    phase: Phase
    accelerator: str | None = None
    tensor_parallel: Count = 1
    profile: str | None = None
    replicas: Annotated[int, Field(ge=1, le=100_000)] = 1
    kv_tokens: Count | None = None
    token_budget: Count = 2048
    max_running: Count = 1024
    region: str = ""
    prefill_first: bool = False

    def names(self) -> list[str]:
        return [self.name] if self.replicas == 1 else [f"{self.name}-{i}" for i in range(self.replicas)]


class LinksSection(LinkSection):
    port_gigabytes_per_s: Positive | None = None
    pairs: Annotated[list[PairSection], Field(default_factory=list)]

    def links(self) -> Links:
        """`pairs` hold in both directions."""
        pairs: dict[tuple[str, str], Link] = {}
        for pair in self.pairs:
            one, other = pair.between
            pairs |= {(one, other): pair.link(), (other, one): pair.link()}
        port = self.port_gigabytes_per_s
        return Links(self.link(), pairs, port * GIGA) if port else Links(self.link(), pairs)


class DeploymentSection(Section):
    """`model` may be missing where all instances are measured; then `kv_bytes_per_token` says what travels."""

    name: Name
    model: str | None = None
    instances: Annotated[list[InstanceSection], Field(min_length=1)]
    links: LinksSection
    kv_bytes_per_token: Annotated[float, Field(ge=0)] | None = None
    codec_ratio: Positive = 1.0
    hand_over: HandOver = HandOver.PULL


def deployment_names() -> dict[str, Path]:
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def deployment(name: str) -> Deployment:
    """A deployment by its name among those shipped, or a YAML file.

    Raises:
        NotFound: it is neither.
        InvalidArgument: every fault of the file, each by instance and field.
    """
    known = deployment_names()
    path = known.get(name, Path(name))
    if not path.is_file():
        raise NotFound(f"no deployment {name!r}: known are {', '.join(known)}, or name a file (.yaml)")
    return read_deployment(path)


def read_deployment(path: Path) -> Deployment:
    """Raises InvalidArgument with every fault."""
    section = validated(DeploymentSection, load_yaml(path), str(path))
    faults = list(_faults(section, path.parent))
    if faults:
        raise InvalidArgument(f"{path}: " + "; ".join(f"{name} {text}" for name, text in faults), faults)
    model = catalogue.model(section.model) if section.model else None
    kv_bytes = section.kv_bytes_per_token
    if kv_bytes is None:
        kv_bytes = model.layers * model.kv_bytes if model else 0.0
    instances = [one for entry in section.instances for one in _instances(entry, model, path.parent)]
    layers = model.layers if model else 1
    return Deployment(instances, section.links.links(), kv_bytes, section.codec_ratio, section.hand_over, layers=layers)


def _faults(section: DeploymentSection, folder: Path) -> Iterator[Fault]:
    names = [name for entry in section.instances for name in entry.names()]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"instance {name}", "appears more than once"
    phases = {entry.phase for entry in section.instances}
    if Phase.PREFILL in phases and len(phases) == 1:
        yield "instances", "only prefill: nobody would decode"
    if section.model and not (section.model in catalogue.model_names() or Path(section.model).is_file()):
        yield "model", f"{section.model!r} is unknown; known: {', '.join(catalogue.model_names())}"
    ends = {*names, *(entry.region for entry in section.instances)}
    for i, pair in enumerate(section.links.pairs):
        for end in set(pair.between) - ends:
            yield f"links.pairs.{i}", f"names {end!r}, which is neither an instance nor a region"
    for entry in section.instances:
        yield from ((f"instance {entry.name}", text) for text in _machine_faults(entry, section.model, folder))


def _machine_faults(entry: InstanceSection, model: str | None, folder: Path) -> Iterator[str]:
    if (entry.accelerator is None) == (entry.profile is None):
        yield "must have either an accelerator or a profile"
    elif entry.profile is not None and not (folder / entry.profile).is_file():
        yield f"has profile {entry.profile!r}, and there is no such file beside the deployment"
    elif entry.accelerator is not None and model is None:
        yield "has an accelerator, so the deployment needs a model"
    elif entry.accelerator is not None and entry.accelerator not in catalogue.accelerators():
        yield f"has accelerator {entry.accelerator!r}; known: {', '.join(catalogue.accelerators())}"


def _instances(entry: InstanceSection, model: ModelProfile | None, folder: Path) -> Iterator[Instance]:
    latency: Latency
    if entry.profile is not None:
        profile = measured.read(folder / entry.profile)
        latency, room = profile.latency(), profile.kv_tokens
    else:
        assert model is not None
        assert entry.accelerator is not None
        book = SpeedBook(model, catalogue.accelerators())
        latency, room = book.latency(entry.accelerator, entry.tensor_parallel), _room(entry, model)
    for name in entry.names():
        yield Instance(
            name, entry.phase, latency, entry.kv_tokens or room, entry.token_budget, entry.max_running, entry.region,
            entry.prefill_first,
        )  # fmt: skip


def _room(entry: InstanceSection, model: ModelProfile) -> int:
    """Tokens of KV beside the weights.

    Raises:
        InvalidArgument: the weights do not fit.
    """
    memory = entry.tensor_parallel * catalogue.accelerators()[str(entry.accelerator)].memory_gigabytes * GIGA
    left = KV_SHARE * memory - model.layers * model.bytes_per_layer
    if left <= 0 and entry.kv_tokens is None:
        raise InvalidArgument(
            f"instance {entry.name}: {model.name} has {model.layers * model.bytes_per_layer / GIGA:.1f} GB of weights, "
            f"and {KV_SHARE:.0%} of its memory are {KV_SHARE * memory / GIGA:.1f} GB"
        )
    return max(1, int(left / (model.layers * model.kv_bytes)))
