"""How many tokens/s a machine sustains with k layers: Helix's estimate from per-layer timings (ASPLOS 2025, section 5).

A machine's typical batch follows from its KV room, the mean request, and the share of a request's round trip that is
spent on it; that share depends on all machines' speeds, which depend on their batches: a fixed point over the mix.
Knows neither links nor hosts.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kvmesh.planner.world import Workload

if TYPE_CHECKING:
    # It builds on this module.
    from kvmesh.planner.latency.api import Latency

KV_USE = 0.3
"""Share of the KV room that running requests fill on average (Helix's KV_CACHE_HWM)."""
ITERATIONS = 10
SPARE_LAYERS = 1.2
"""Below this ratio of room to layers, machines are taken to hold as many layers as fit."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class MachineProfile:
    """One machine type: `prompt_ms` maps tokens, `decode_ms` requests in a batch to ms for one layer; `kv_entries[k-1]`
    is the KV room (positions x layers) beside k layers; `initial_speed` is where the fixed point starts (layers/s). A
    batch takes `prompt_batch` prompts and, beside k layers, `decode_batch[k-1]` decodes at most."""

    typical_layers: int
    packed_layers: int
    initial_speed: float
    kv_entries: tuple[int, ...]
    prompt_ms: tuple[tuple[float, float], ...]
    decode_ms: tuple[tuple[float, float], ...]
    prompt_batch: int = 1
    decode_batch: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """A model and the machines it was profiled on: tables of one layer, or fits of the whole model. `kv_bytes` are of
    one token in one layer; its weights take at most `weights_share` of a host's memory."""

    name: str
    layers: int
    bytes_per_layer: float
    token_bytes: float
    activation_bytes: float
    machines: Mapping[str, MachineProfile]
    kv_bytes: float = 0.0
    weights_share: float = 0.5
    fits: Mapping[str, Latency] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Mix:
    """The fixed point's state: machine counts, typical layers and speeds (layers/s, one batch) by type."""

    model: ModelProfile
    workload: Workload
    counts: Mapping[str, int]
    typical: Mapping[str, int]
    speed: Mapping[str, float]

    def throughput(self, machine: str, layers: int) -> float:
        """T(k), tokens/s: one prompt and the decode steps that keep pace with it, through k layers."""
        profile, work = self.model.machines[machine], self.workload
        positions = int(KV_USE * profile.kv_entries[layers - 1] / layers)
        decode = positions / (work.input_tokens + work.output_tokens) * self._share(machine, layers)
        prompts = decode / work.output_tokens
        if prompts > 1:
            seconds = interpolate(profile.prompt_ms, work.input_tokens) + interpolate(
                profile.decode_ms, work.output_tokens
            )
            return 1e3 * (work.input_tokens + work.output_tokens) / (layers * seconds)
        return _per_prompt(profile, layers, prompts, round(prompts * work.input_tokens), round(decode))

    def _share(self, machine: str, layers: int) -> float:
        """Of a round trip, spent on this machine."""
        held = sum(n * self.typical[m] for m, n in self.counts.items())
        mean = sum(n * self.typical[m] / self.speed[m] for m, n in self.counts.items()) / held
        here = layers / self.speed[machine]
        return here / ((self.model.layers - layers) * mean + here)


def _per_prompt(profile: MachineProfile, layers: int, prompts: float, prompt_tokens: int, decode: int) -> float:
    if not prompt_tokens + decode:
        return 0.0
    milliseconds = interpolate(profile.prompt_ms, int(prompt_tokens / prompts))
    milliseconds += interpolate(profile.decode_ms, decode) / prompts
    return 1e3 * (prompt_tokens + decode) / prompts / (layers * milliseconds)


def throughput_tables(
    model: ModelProfile, counts: Mapping[str, int], workload: Workload
) -> dict[str, tuple[float, ...]]:
    """T(1), T(2), ... in tokens/s for each machine type of a cluster with `counts` machines of each."""
    machines = {name: model.machines[name] for name in counts}
    typical = {name: profile.typical_layers for name, profile in machines.items()}
    if sum(n * typical[name] for name, n in counts.items()) < model.layers * SPARE_LAYERS:
        typical = {name: profile.packed_layers for name, profile in machines.items()}
    mix = _Mix(model, workload, counts, typical, {name: p.initial_speed for name, p in machines.items()})
    for _ in range(ITERATIONS):
        mix = replace(mix, speed={name: mix.throughput(name, typical[name]) * typical[name] for name in counts})
    return {
        name: tuple(mix.throughput(name, k) for k in range(1, len(profile.kv_entries) + 1))
        for name, profile in machines.items()
    }


def interpolate(points: Points, x: float) -> float:
    """Piecewise linear through points sorted by x; beyond the ends the outermost pieces go on."""
    right = min(max(bisect_left(points, (x,)), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
