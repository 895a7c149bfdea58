"""Helix's latency model (ASPLOS 2025): tables of the milliseconds that one layer takes, times the layers held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvmesh.planner.latency.api import Chunk, Latency
from kvmesh.planner.profiles import MachineProfile, interpolate

MILLI = 1e-3


@dataclass(frozen=True, slots=True)
class LayersLatency(Latency):
    """`layers` of the model on one machine. The tables were taken at short contexts: each token of KV that decoding
    reads adds `seconds_per_context`. Prompts and decodes do not overlap."""

    profile: MachineProfile
    layers: int
    seconds_per_context: float = 0.0

    def iteration(self, chunks: Sequence[Chunk], decodes: int, context: int) -> float:
        milliseconds = 0.0
        if chunks:
            milliseconds += interpolate(self.profile.prompt_ms, sum(tokens for _, tokens in chunks))
        if decodes:
            milliseconds += interpolate(self.profile.decode_ms, decodes)
        return self.layers * milliseconds * MILLI + self.seconds_per_context * context
