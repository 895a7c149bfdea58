"""Splitwise's latency model (ISCA 2024): straight lines between measured points, for prompts and for decode steps.

The points are medians of Splitwise's own runs (`splitwise-sim`, MIT), shipped with the power profiles of the same runs.
They were taken at contexts of a few thousand tokens, so the context of a step changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field

from kvmesh.errors import NotFound
from kvmesh.planner.cluster_file import validated
from kvmesh.planner.latency.api import Chunk, Latency
from kvmesh.planner.profiles import interpolate

DATA = Path(__file__).parents[1] / "data" / "power" / "profiles.json"
MILLI = 1e-3

Points = Annotated[list[tuple[float, float]], Field(min_length=2)]


@dataclass(frozen=True, slots=True)
class SplitwiseLatency(Latency):
    """`prompt_ms` by tokens in the prompts of an iteration, `step_ms` by sequences that decode in it."""

    prompt_ms: tuple[tuple[float, float], ...]
    step_ms: tuple[tuple[float, float], ...]

    def iteration(self, chunks: Sequence[Chunk], decodes: int, context: int) -> float:
        """Prompts and decodes in one iteration take the longer of their first points, and the sum of what is above."""
        prompt = self._above(self.prompt_ms, sum(tokens for _, tokens in chunks)) if chunks else (0.0, 0.0)
        step = self._above(self.step_ms, decodes) if decodes else (0.0, 0.0)
        return MILLI * (max(prompt[0], step[0]) + prompt[1] + step[1])

    @staticmethod
    def _above(points: Sequence[tuple[float, float]], amount: int) -> tuple[float, float]:
        """Milliseconds of the first point, which fewer take, too; and those above it."""
        first = points[0][1]
        return first, max(0.0, interpolate(points, amount) - first)


class _Profile(BaseModel):
    name: str
    prompt_ms: Points
    step_ms: Points


class _Document(BaseModel):
    profiles: list[_Profile]


def splitwise(accelerator: str, model: str, tensor_parallel: int) -> SplitwiseLatency:
    """The published profile, such as ("H100-80G", "llama2-70b", 8).

    Raises:
        NotFound: it was not measured; the message says what was.
    """
    profiles = {p.name: p for p in validated(_Document, json.loads(DATA.read_text()), str(DATA)).profiles}
    name = f"{accelerator}/{model}/{tensor_parallel}"
    if name not in profiles:
        raise NotFound(f"Splitwise did not measure {name}, only {', '.join(profiles)}")
    return SplitwiseLatency(tuple(profiles[name].prompt_ms), tuple(profiles[name].step_ms))
