"""What a plan is made of: hosts, links, workloads, spans of layers, and the numeric problem the algorithms see.

Knows no file format, no accelerator by name and no algorithm. Bandwidths are bytes/s, flows tokens/s (prompt and decode
together), memory bytes, latencies seconds. The coordinator, which sends and collects tokens, is both SOURCE and SINK.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SOURCE, SINK = -1, -2

Edge = tuple[int, int]
Span = tuple[int, int]
"""[first layer, end layer), as a host holds them."""


@dataclass(frozen=True, slots=True)
class Host:
    """One machine. `machine` is the key of its profile (T4x2: two T4 in tensor parallel)."""

    name: str
    machine: str
    memory_bytes: float
    nic_bytes_per_s: float


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
class Workload:
    """Mean request, in tokens."""

    name: str
    input_tokens: float
    output_tokens: float

    @property
    def decode_share(self) -> float:
        return self.output_tokens / (self.input_tokens + self.output_tokens)


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


@dataclass(frozen=True, slots=True)
class Plan:
    """An algorithm's answer. `bound` is proven: no placement of the same problem flows more."""

    algorithm: str
    placement: Mapping[int, Span]
    flow: Flow
    bound: float
    seconds: float

    @property
    def gap(self) -> float:
        """How far the flow may be below the best, as a share of the bound."""
        return max(0.0, 1 - self.flow.value / self.bound)
