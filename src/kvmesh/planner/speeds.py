"""How fast an accelerator, or several in tensor parallel, run a model: from a profile, else from the datasheet.

Per-layer tables (Helix) and fitted lines (DistServe) are used as they are; for hardware without a profile the roofline
of its datasheet stands in. Knows no hosts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvmesh.planner.cluster_file import GIGA, Accelerator
from kvmesh.planner.latency.api import Latency
from kvmesh.planner.latency.layers import LayersLatency
from kvmesh.planner.latency.roofline import BANDWIDTH_SHARE, RooflineLatency
from kvmesh.planner.profiles import ModelProfile

KV_SHARE = 0.9
"""Of the memory, for weights and KV together."""


@dataclass(frozen=True, eq=False)
class SpeedBook:
    """Latencies of one model by accelerator and how many are in tensor parallel."""

    model: ModelProfile
    accelerators: Mapping[str, Accelerator]
    _known: dict[tuple[str, int], Latency] = field(default_factory=dict)

    def known(self) -> list[str]:
        return list(self.accelerators)

    def knows(self, accelerator: str) -> bool:
        return accelerator in self.accelerators

    def machine(self, accelerator: str, size: int) -> str:
        """The name in profiles."""
        name = self.accelerators[accelerator].profile
        return name if size == 1 else f"{name}x{size}"

    def sizes(self, accelerator: str, most: int) -> list[int]:
        """Tensor parallelism of at most `most`: powers of two, and only what was measured if anything was."""
        powers = [1 << power for power in range(most.bit_length())]
        measured = [size for size in powers if self.measured(accelerator, size)]
        return measured or powers

    def measured(self, accelerator: str, size: int) -> bool:
        machine = self.machine(accelerator, size)
        return machine in self.model.fits or machine in self.model.machines

    def peer_bytes_per_s(self, accelerator: str) -> float:
        return self.accelerators[accelerator].peer_gigabytes_per_s * GIGA

    def latency(self, accelerator: str, size: int) -> Latency:
        if (accelerator, size) not in self._known:
            self._known[accelerator, size] = self._find(accelerator, size)
        return self._known[accelerator, size]

    def _find(self, accelerator: str, size: int) -> Latency:
        machine = self.machine(accelerator, size)
        if machine in self.model.fits:
            return self.model.fits[machine]
        if machine in self.model.machines:
            profile = self.model.machines[machine]
            return LayersLatency(profile, self.model.layers, self._kv_reading(accelerator, size))
        return self._roofline(accelerator, size)

    def _kv_reading(self, accelerator: str, size: int) -> float:
        bandwidth = BANDWIDTH_SHARE * self.accelerators[accelerator].memory_gigabytes_per_s * GIGA
        return self.model.layers * self.model.kv_bytes / (size * bandwidth)

    def _roofline(self, accelerator: str, size: int) -> RooflineLatency:
        model, datasheet = self.model, self.accelerators[accelerator]
        return RooflineLatency(
            weight_bytes=model.layers * model.bytes_per_layer,
            layers=model.layers,
            kv_bytes=model.layers * model.kv_bytes,
            activation_bytes=model.activation_bytes,
            flops=datasheet.fp16_teraflops * 1e12,
            memory_bytes_per_s=datasheet.memory_gigabytes_per_s * GIGA,
            tensor_parallel=size,
            peer_bytes_per_s=datasheet.peer_gigabytes_per_s * GIGA,
        )
