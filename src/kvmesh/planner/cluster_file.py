"""Reads a cluster from YAML: hosts with their accelerators, in regions, and the links inside, across and by name.

Every fault is named at once, by its place in the file. Which models run on which machine is not known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvmesh.errors import InvalidArgument
from kvmesh.planner.world import SINK, SOURCE, Cluster, Edge, Host, Link

GIGA, MILLI = 1e9, 1e-3
IDLE_SHARE = 0.155
"""Of the full watts, drawn by an accelerator that holds a model and is idle: 62 of 400 W on an A100, as users report;
for the others an assumption."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Positive = Annotated[float, Field(gt=0)]
Validated = TypeVar("Validated", bound=BaseModel)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Accelerator(Section):
    """An entry of the catalogue. `profile` is its name in model profiles; TFLOPS are dense, FP16 or BF16 on tensor
    cores with FP32 sums; `peer` is one way to its neighbour in the host (NVLink where there is, else PCIe); idle watts
    are no datasheet's figure, so they are stated only where somebody measured them."""

    profile: str
    memory_gigabytes: Positive
    memory_gigabytes_per_s: Positive
    fp16_teraflops: Positive
    peer_gigabytes_per_s: Positive
    watts: Positive
    idle_watts: Positive | None = None
    source: str

    @property
    def resting_watts(self) -> float:
        return self.idle_watts or IDLE_SHARE * self.watts


class HostSection(Section):
    """`replicas` equal hosts, named NAME-0, NAME-1, ... when there is more than one. The price is of one host; `watts`
    and `idle_watts` of one host replace those of its accelerators."""

    name: Name
    accelerator: str
    accelerators: Annotated[int, Field(ge=1)] = 1
    replicas: Annotated[int, Field(ge=1, le=1024)] = 1
    region: Name = "default"
    nic_gigabytes_per_s: Positive = 10.0
    dollars_per_hour: Annotated[float, Field(ge=0)] = 0.0
    watts: Positive | None = None
    idle_watts: Positive | None = None

    def names(self) -> list[str]:
        return [self.name] if self.replicas == 1 else [f"{self.name}-{i}" for i in range(self.replicas)]


class LinkSection(Section):
    gigabytes_per_s: Positive
    milliseconds: Annotated[float, Field(ge=0)]

    def link(self) -> Link:
        return Link(self.gigabytes_per_s * GIGA, self.milliseconds * MILLI)


class PairSection(LinkSection):
    """Overrides the links between two regions or two hosts (of which one may be `coordinator`)."""

    between: Annotated[list[str], Field(min_length=2, max_length=2)]


class LinksSection(Section):
    """`across` may be missing: then regions are joined only by `pairs`."""

    inside: LinkSection
    across: LinkSection | None = None
    pairs: list[PairSection] = []


class ClusterSection(Section):
    name: Name
    coordinator_region: Name = "default"
    hosts: Annotated[list[HostSection], Field(min_length=1)]
    links: LinksSection


def read_cluster(path: Path, accelerators: Mapping[str, Accelerator]) -> Cluster:
    """Raises InvalidArgument with every fault, each by field and host."""
    section = validated(ClusterSection, load_yaml(path), str(path))
    faults = list(_faults(section, accelerators))
    if faults:
        raise InvalidArgument(f"{path}: " + "; ".join(f"{name} {text}" for name, text in faults), faults)
    regions = [host.region for host in section.hosts for _ in range(host.replicas)]
    hosts = tuple(host for entry in section.hosts for host in _hosts(entry, accelerators[entry.accelerator]))
    return Cluster(section.name, hosts, dict(_links(section, [host.name for host in hosts], regions)))


def _hosts(section: HostSection, accelerator: Accelerator) -> Iterator[Host]:
    count = section.accelerators
    machine = accelerator.profile if count == 1 else f"{accelerator.profile}x{count}"
    for name in section.names():
        yield Host(
            name=name,
            machine=machine,
            memory_bytes=count * accelerator.memory_gigabytes * GIGA,
            nic_bytes_per_s=section.nic_gigabytes_per_s * GIGA,
            accelerator=section.accelerator,
            accelerators=count,
            region=section.region,
            dollars_per_hour=section.dollars_per_hour,
            watts=section.watts or count * accelerator.watts,
            idle_watts=section.idle_watts or count * accelerator.resting_watts,
        )


def _faults(section: ClusterSection, accelerators: Mapping[str, Accelerator]) -> Iterator[tuple[str, str]]:
    names = [name for host in section.hosts for name in host.names()]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"host {name}", "appears more than once"
    for host in section.hosts:
        if host.accelerator not in accelerators:
            yield f"host {host.name}", f"has accelerator {host.accelerator!r}; known: {', '.join(accelerators)}"
        if host.watts and host.idle_watts and host.idle_watts > host.watts:
            yield f"host {host.name}", f"draws {host.idle_watts:g} W idle and {host.watts:g} W at full load"
    regions = {host.region for host in section.hosts}
    if section.coordinator_region not in regions:
        yield "coordinator_region", f"{section.coordinator_region!r} has no host; regions: {', '.join(sorted(regions))}"
    for i, pair in enumerate(section.links.pairs):
        for end in pair.between:
            if end not in regions | set(names) | {"coordinator"}:
                yield f"links.pairs.{i}", f"names {end!r}, which is neither a region nor a host"


def _links(section: ClusterSection, names: Sequence[str], regions: Sequence[str]) -> Iterator[tuple[Edge, Link]]:
    # Both ends of every link by name: the coordinator counts as a host of its region.
    ends = [*enumerate(zip(names, regions, strict=True)), (SOURCE, ("coordinator", section.coordinator_region))]
    for tail, (tail_name, tail_region) in ends:
        for head, (head_name, head_region) in ends:
            link = _between(section.links, (tail_name, tail_region), (head_name, head_region))
            if tail != head and link:
                yield (tail, SINK if head == SOURCE else head), link


def _between(links: LinksSection, a: tuple[str, str], b: tuple[str, str]) -> Link | None:
    """The last pair that names both ends wins; else inside or across."""
    for pair in reversed(links.pairs):
        x, y = pair.between
        if (x in a and y in b) or (x in b and y in a):
            return pair.link()
    default = links.inside if a[1] == b[1] else links.across
    return default.link() if default else None


def load_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path} is not YAML: {' '.join(str(error).split())}") from None


def validated(section: type[Validated], document: Any, where: str) -> Validated:
    """Pydantic's verdict as one sentence that names every fault."""
    try:
        return section.model_validate(document)
    except ValidationError as error:
        faults = [(".".join(map(str, e["loc"])) or "the document", e["msg"]) for e in error.errors()]
        message = f"{where}: " + "; ".join(f"{name}: {text}" for name, text in faults)
        raise InvalidArgument(message, faults) from None
