"""What `kvmesh profile` measured of a worker: the points, the fitted lines, and how well they hold.

A JSON file; the lines are DistServe's. Reading it is validated with all faults named; the fit is made anew from the
points, so that a file cannot disagree with itself.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from kvmesh.errors import InvalidArgument
from kvmesh.planner.cluster_file import Positive, Section, validated
from kvmesh.planner.latency.distserve import DistServeLatency, Line
from kvmesh.planner.latency.fit import Fit, fit

NEVER = 1 << 30
FEWEST_POINTS = 5
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, slots=True)
class PrefillPoint:
    """A prompt of `tokens` took `seconds` from its first iteration to its first token."""

    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class DecodePoint:
    """A step of `batch` sequences with `context` tokens of KV altogether took `seconds`."""

    batch: int
    context: int
    seconds: float


class _Prefill(Section):
    tokens: Count
    seconds: Positive


class _Decode(Section):
    batch: Count
    context: Count
    seconds: Positive


class _Document(Section):
    worker: str
    model: str
    kv_tokens: Count
    token_budget: Count
    prefill: Annotated[list[_Prefill], Field(min_length=1)]
    decode: list[_Decode] = Field(default_factory=list)
    errors: dict[str, Any] = Field(default_factory=dict)

    @field_validator("prefill", "decode")
    @classmethod
    def _enough(cls, points: list[Any]) -> list[Any]:
        if points and len(points) < FEWEST_POINTS:
            raise ValueError(f"needs at least {FEWEST_POINTS} points")
        return points


@dataclass(frozen=True, slots=True)
class Profile:
    """A worker of `kv_tokens` of room, and how fast it was. One that only prefills has no decode points.

    `token_budget` is its engine's: a longer prompt took several iterations, and so several times the constant.
    """

    worker: str
    model: str
    kv_tokens: int
    token_budget: int
    prefill: tuple[PrefillPoint, ...]
    decode: tuple[DecodePoint, ...] = ()

    def prefill_fit(self) -> Fit:
        features = [(ceil(p.tokens / self.token_budget), p.tokens, p.tokens**2) for p in self.prefill]
        return fit(features, [p.seconds for p in self.prefill])

    def decode_fit(self) -> Fit | None:
        if not self.decode:
            return None
        return fit([(1.0, p.context, p.batch) for p in self.decode], [p.seconds for p in self.decode])

    def latency(self) -> DistServeLatency:
        """Without decode points a decode step is taken to cost what a prompt of one token does."""
        prompt = _line(self.prefill_fit())
        decode = self.decode_fit()
        step = _line(decode) if decode else (prompt[0], 0.0, prompt[1])
        return DistServeLatency(prompt, step, step, NEVER)

    def write(self, path: Path) -> None:
        fits = {"prefill": self.prefill_fit(), "decode": self.decode_fit()}
        errors = {name: {"mape": one.mape, "held_out": one.held_out} for name, one in fits.items() if one}
        path.write_text(json.dumps({**asdict(self), "errors": errors}, indent=1) + "\n")


def read(path: Path) -> Profile:
    """
    Raises:
        InvalidArgument: it is no profile; the message names every field that is wrong.
    """
    try:
        document: Any = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path} is not JSON: {error}") from None
    except OSError as error:
        raise InvalidArgument(f"cannot read {path}: {error.strerror}") from None
    found = validated(_Document, document, str(path))
    prefill = tuple(PrefillPoint(p.tokens, p.seconds) for p in found.prefill)
    decode = tuple(DecodePoint(p.batch, p.context, p.seconds) for p in found.decode)
    return Profile(found.worker, found.model, found.kv_tokens, found.token_budget, prefill, decode)


def _line(found: Fit) -> Line:
    first, second, third = found.coefficients
    return first, second, third
