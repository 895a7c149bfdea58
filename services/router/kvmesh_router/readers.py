"""Over which links the KV of a prompt will be read: what decode workers are there, and what their replies said.

Told of workers and of replies; asks nobody. A prefill worker decides by it whether KV travels raw. What counts is the
harmonic mean of a link's last REPLIES, for what is stored once is read again and again, over a link that may vary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import harmonic_mean

from kvmesh.rpc.address import same_host
from kvmesh.types import ChunkSource, Readers, Role, WorkerInfo

REPLIES = 4


@dataclass(slots=True)
class ReaderLinks:
    """Addresses of decode workers, and the bytes per second lately measured from a store to each."""

    _addresses: dict[str, str] = field(default_factory=dict)
    _throughputs: dict[str, deque[float]] = field(default_factory=dict)

    def retain(self, workers: Iterable[WorkerInfo]) -> None:
        """These are there now, and no others."""
        self._addresses = {w.worker_id: w.address for w in workers if w.role is Role.DECODE}
        self._throughputs = {name: rate for name, rate in self._throughputs.items() if name in self._addresses}

    def note(self, worker: WorkerInfo, bytes_per_second: float) -> None:
        """What a reply said; 0 says nothing."""
        if bytes_per_second > 0:
            self._throughputs.setdefault(worker.worker_id, deque(maxlen=REPLIES)).append(bytes_per_second)

    def of(self, sources: Sequence[ChunkSource]) -> Readers:
        """Whoever may decode what these sources will hold; the slowest link counts."""
        remote = [
            name
            for name, address in self._addresses.items()
            if not all(same_host(address, source.address) for source in sources)
        ]
        measured = [harmonic_mean(self._throughputs[name]) for name in remote if name in self._throughputs]
        return Readers(bool(remote), min(measured, default=0.0))
