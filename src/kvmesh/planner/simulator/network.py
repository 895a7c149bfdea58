"""How long KV is on its way: links and ports that serve one transfer after the other, first come, first served.

A transfer waits until its link and both ports are free, then has the narrowest of them to itself. Knows no requests.
"""

from __future__ import annotations

from collections import defaultdict

from kvmesh.planner.simulator.deployment import Instance, Links
from kvmesh.planner.world import Link


class Network:
    """The links' queues. Times are seconds; transfers must be asked for in the order of their asking times."""

    def __init__(self, links: Links) -> None:
        self._links = links
        self._free_at: defaultdict[tuple[str, str], float] = defaultdict(float)
        self.bytes = 0.0

    def transfer(
        self, source: Instance, target: Instance, size: float, earliest: float, ready: float = 0.0, last: float = 0.0
    ) -> float:
        """When `size` bytes have arrived, that begin to leave at `earliest`, the `last` of them not before `ready`."""
        link = self._between(source, target)
        queues = [(source.name, target.name), (source.name, "out"), (target.name, "in")]
        bandwidth = min(link.bytes_per_s, self._links.port_bytes_per_s)
        begin = max(earliest, *(self._free_at[queue] for queue in queues))
        end = max(begin + size / bandwidth, ready + last / bandwidth)
        self._free_at.update(dict.fromkeys(queues, end))
        self.bytes += size
        return end + link.seconds

    def _between(self, source: Instance, target: Instance) -> Link:
        """By name, else by region, else the default."""
        pairs = self._links.pairs
        named = pairs.get((source.name, target.name))
        return named or pairs.get((source.region, target.region)) or self._links.default
