"""How hosts form batches and how long those take: Helix's way, and ours with prompts in chunks and decodes first.

Times come from the profile: `layers · (prompt_ms(tokens) + decode_ms(requests))`, a lone decode twice as long, and
copying activations in and out of the accelerator; these are the assumptions of Helix's own simulator. Knows no events.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from kvmesh.planner.profiles import MachineProfile, interpolate

COPY_SECONDS_PER_BYTE = 1 / 4e9 + 1 / 5e9
"""Joining activations of one batch in host memory, then moving them to the accelerator."""
LONGEST = 2048
"""Tokens in a prompt, at most."""


@dataclass(frozen=True, slots=True)
class Execution:
    """A policy. Without `chunk_tokens` prompts are computed whole. `decodes` bounds a batch further: decodes that wait
    together would stay together, and all hosts but one idle. `together` sends what a batch has for one next host as one
    message; `express` lets decodes pass prompts on links, frame by frame."""

    name: str
    chunk_tokens: int | None = None
    decodes: int | None = None
    together: bool = False
    express: bool = False


HELIX = Execution("helix")
CHUNKED = Execution("chunked", chunk_tokens=256, decodes=48, together=True, express=True)


@dataclass(frozen=True, slots=True)
class BatchTimes:
    """Seconds of a batch on a host with a number of layers."""

    prompt: tuple[float, ...]
    decode: tuple[float, ...]
    seconds_per_arrival: float
    prompts: int
    decodes: int
    """Most requests in a batch."""

    def seconds(self, prompt_tokens: int, decodes: int, arrived: int) -> float:
        """`arrived` tokens came since the last batch."""
        lone = 2.0 if decodes == 1 else 1.0
        return self.prompt[prompt_tokens] + lone * self.decode[decodes] + arrived * self.seconds_per_arrival


@cache
def _tables(profile: MachineProfile) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Seconds of one layer for every number of prompt tokens and of decodes."""
    prompts = tuple(interpolate(profile.prompt_ms, n) / 1e3 for n in range(profile.prompt_batch * LONGEST + 1))
    decodes = tuple(interpolate(profile.decode_ms, n) / 1e3 for n in range(max(profile.decode_batch) + 1))
    return prompts, decodes


def batch_times(profile: MachineProfile, layers: int, activation_bytes: float) -> BatchTimes:
    prompt, decode = _tables(profile)
    return BatchTimes(
        tuple(layers * seconds for seconds in prompt),
        tuple(layers * seconds for seconds in decode),
        activation_bytes * COPY_SECONDS_PER_BYTE,
        profile.prompt_batch,
        profile.decode_batch[layers - 1],
    )
