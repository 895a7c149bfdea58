"""A latency model from datasheets alone: an iteration takes as long as its arithmetic or its memory traffic, whichever
is longer (Williams et al., CACM 2009), at the share of the peaks that real engines reach.

Arithmetic: two operations a parameter and token, and attention's over all pairs. Traffic: the weights once an
iteration, and the KV that is read. Tensor parallelism divides both and adds two all-reduces a layer; pipeline stages
follow each other, so they divide what each one holds but not the time of an iteration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from kvmesh.planner.latency.api import Chunk, Latency

COMPUTE_SHARE, BANDWIDTH_SHARE = 0.6, 0.65
"""Of the datasheet's peaks. An A100 reaches 0.6 to 0.8 and 0.64 to 0.7 in DistServe's and Helix's profiles."""
LAUNCH_SECONDS = 1e-4
"""Of an iteration's kernels, for each layer: what a batch of nothing would cost."""
ALL_REDUCES = 2
"""In each layer, after attention and after the MLP."""


@dataclass(frozen=True, slots=True)
class RooflineLatency(Latency):
    """Weights are `weight_bytes`, at two bytes a parameter, over `layers`; `kv_bytes` and `activation_bytes` are of one
    token, of all layers and of one. Peaks are one accelerator's, per second; `peer_bytes_per_s` joins two of them."""

    weight_bytes: float
    layers: int
    kv_bytes: float
    activation_bytes: float
    flops: float
    memory_bytes_per_s: float
    tensor_parallel: int = 1
    pipeline: int = 1
    peer_bytes_per_s: float = inf
    hop_seconds: float = 0.0

    def iteration(self, chunks: Sequence[Chunk], decodes: int, context: int) -> float:
        tokens = sum(count for _, count in chunks) + decodes
        if not tokens:
            return 0.0
        pairs = sum(count * (start + count / 2) for start, count in chunks) + context
        read = context + sum(start + count for start, count in chunks)
        # Each pair is a product of queries with keys and one with values, of all heads: four operations a channel.
        operations = self.weight_bytes * tokens + 2 * self.activation_bytes * self.layers * pairs
        compute = operations / (COMPUTE_SHARE * self.flops)
        memory = (self.weight_bytes + self.kv_bytes * read) / (BANDWIDTH_SHARE * self.memory_bytes_per_s)
        overhead = self.layers * LAUNCH_SECONDS + (self.pipeline - 1) * self.hop_seconds
        return max(compute, memory) / self.tensor_parallel + self._exchange(tokens) + overhead

    def _exchange(self, tokens: int) -> float:
        """Ring all-reduces send each byte twice, but for one part in `tensor_parallel`."""
        sent = 2 * (self.tensor_parallel - 1) / self.tensor_parallel * self.activation_bytes * tokens
        return ALL_REDUCES * self.layers * sent / self.peer_bytes_per_s
