"""What a plan is made of: hosts, links, workloads, spans of layers, and the numeric problem the algorithms see.

Knows no file format, no accelerator by name and no algorithm. Bandwidths are bytes/s, flows tokens/s (prompt and decode
together), memory bytes, latencies seconds. The coordinator, which sends and collects tokens, is both SOURCE and SINK.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

SOURCE, SINK = -1, -2

Edge = tuple[int, int]
Span = tuple[int, int]
"""[first layer, end layer), as a host holds them."""


class Phase(StrEnum):
    """What a group of hosts computes: prompts, tokens one by one, or both."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"

    @property
    def prefills(self) -> bool:
        return self is not Phase.DECODE

    @property
    def decodes(self) -> bool:
        return self is not Phase.PREFILL


@dataclass(frozen=True, slots=True)
class Host:
    """One machine. `machine` is the key of its profile with all accelerators in tensor parallel (T4x2: two T4).

    `accelerator` is one of them in the catalogue; memory, price and watts (full load and idle) are of the whole host.
    """

    name: str
    machine: str
    memory_bytes: float
    nic_bytes_per_s: float
    accelerator: str = ""
    accelerators: int = 1
    region: str = "default"
    dollars_per_hour: float = 0.0
    watts: float = 0.0
    idle_watts: float = 0.0


@dataclass(frozen=True, slots=True)
class Link:
    bytes_per_s: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Cluster:
    """Hosts, and directed links between their indices, SOURCE and SINK."""

    name: str
    hosts: tuple[Host, ...]
    links: Mapping[Edge, Link]

    def mix(self) -> dict[str, int]:
        """How many hosts there are of each machine type."""
        machines = [host.machine for host in self.hosts]
        return {machine: machines.count(machine) for machine in dict.fromkeys(machines)}


@dataclass(frozen=True, slots=True)
class Slo:
    """Seconds to the first token, and between tokens, which a share of the requests must meet together."""

    ttft: float
    tpot: float
    attainment: float = 0.9


@dataclass(frozen=True, slots=True)
class Workload:
    """Mean request, in tokens; a sample of requests as (input, output); and how many arrive a second, if known."""

    name: str
    input_tokens: float
    output_tokens: float
    lengths: tuple[tuple[int, int], ...] = ()
    rate: float | None = None
    slo: Slo | None = None

    @property
    def tokens(self) -> float:
        return self.input_tokens + self.output_tokens

    def sample(self) -> tuple[tuple[int, int], ...]:
        """Without a sample, every request is the mean one."""
        return self.lengths or ((round(self.input_tokens), max(1, round(self.output_tokens))),)

    @property
    def decode_share(self) -> float:
        return self.output_tokens / self.tokens


@dataclass(frozen=True, slots=True)
class Problem:
    """Place `layers` layers on hosts. `throughput[i][k-1]` is T_i(k), the tokens/s of host i when it holds k layers,
    `kv_entries[i][k-1]` its room for KV then (token positions x layers), `capacity` tokens/s of each directed link."""

    hosts: tuple[str, ...]
    machines: tuple[str, ...]
    layers: int
    throughput: tuple[tuple[float, ...], ...]
    kv_entries: tuple[tuple[int, ...], ...]
    capacity: Mapping[Edge, float]

    def max_layers(self, host: int) -> int:
        return len(self.throughput[host])


@dataclass(frozen=True, slots=True)
class Flow:
    """A maximum flow: its value and what each used link carries, tokens/s."""

    value: float
    edges: Mapping[Edge, float]

    def through(self, host: int) -> float:
        return sum(flow for (_, head), flow in self.edges.items() if head == host)


@dataclass(frozen=True, slots=True, order=True)
class Shard:
    """Some accelerators of one host, in tensor parallel, with the layers they hold. Numbered within the host.

    `time` is the share of theirs that is the group's, where they work for two."""

    host: int
    accelerators: tuple[int, ...]
    span: Span
    time: float = 1.0

    @property
    def layers(self) -> int:
        return self.span[1] - self.span[0]


@dataclass(frozen=True, slots=True)
class Group:
    """Shards that hold the whole model together and compute one phase. Shards of equal span share the work."""

    phase: Phase
    shards: tuple[Shard, ...]

    @property
    def stages(self) -> dict[Span, list[Shard]]:
        """In order of layers."""
        spans: dict[Span, list[Shard]] = {}
        for shard in sorted(self.shards, key=lambda shard: (shard.span, shard)):
            spans.setdefault(shard.span, []).append(shard)
        return spans

    @property
    def tensor(self) -> int:
        """The widest tensor parallelism."""
        return max(len(shard.accelerators) for shard in self.shards)


@dataclass(frozen=True, slots=True)
class Route:
    """Requests whose prompt group `prefill` computes and whose tokens group `decode` does (the same one if mixed).

    `share` is of all requests, `attainment` the probability that such a request meets its SLO.
    """

    prefill: int
    decode: int
    share: float
    attainment: float


@dataclass(frozen=True, slots=True)
class Expected:
    """What a plan should give: requests/s that meet the SLO, means in seconds, and what it costs at that rate."""

    goodput: float
    ttft: float
    tpot: float
    dollars_per_hour: float
    joules_per_token: float
    watts: float


@dataclass(frozen=True, slots=True)
class Plan:
    """An algorithm's answer. `bound` is proven: no placement of the same problem flows more.

    Nodes of `placement` and `flow` are the hosts of the problem or, where groups share hosts, their shards in order.
    `standby` are groups that hold their layers and are sent nothing, until the world changes.
    """

    algorithm: str
    placement: Mapping[int, Span]
    flow: Flow
    bound: float
    seconds: float
    groups: tuple[Group, ...] = ()
    routes: tuple[Route, ...] = ()
    expected: Expected | None = None
    standby: tuple[Group, ...] = ()

    @property
    def gap(self) -> float:
        """How far the flow may be below the best, as a share of the bound."""
        return max(0.0, 1 - self.flow.value / self.bound)
