"""When requests arrive and how long they are: Poisson processes and public traces. Pure.

Knows lengths, times and which leading parts requests share; not the tokens (`prompts`) and not the mesh (`load`).
"""

from __future__ import annotations

import csv
import itertools
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from kvmesh.errors import InvalidArgument, NotFound

MOONCAKE_BLOCK = 512
"""Tokens that one hash id of a Mooncake trace stands for."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens of a prompt; segments of equal id begin with equal tokens."""

    id: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request to come. `at`: seconds from the start; `output_tokens`: exactly so many are generated."""

    at: float
    prompt: tuple[Segment, ...]
    output_tokens: int

    @property
    def prompt_tokens(self) -> int:
        return sum(segment.tokens for segment in self.prompt)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Token counts drawn uniformly from [low, high]."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """From '128' or '64-256'.

        Raises:
            InvalidArgument: it is neither, or not 1 <= low <= high.
        """
        low, _, high = text.partition("-")
        try:
            lengths = cls(int(low), int(high or low))
        except ValueError:
            lengths = cls(0, 0)
        if not 1 <= lengths.low <= lengths.high:
            raise InvalidArgument(f"{text!r} is not a length such as 128 or 64-256")
        return lengths

    def draw(self, chance: random.Random) -> int:
        return chance.randint(self.low, self.high)


def poisson(
    rate: float,
    requests: int,
    prompt: Lengths,
    output: Lengths,
    *,
    seed: int = 0,
    shared_tokens: int = 0,
    shared_prefixes: int = 1,
) -> list[Arrival]:
    """`requests` arrivals of a Poisson process of `rate` per second.

    `shared_tokens`: each prompt begins with so many tokens of one of `shared_prefixes` common beginnings.
    """
    chance = random.Random(seed)
    times = itertools.accumulate(chance.expovariate(rate) for _ in range(requests))
    arrivals = []
    for number, at in enumerate(times):
        total = prompt.draw(chance)
        shared = min(shared_tokens, total)
        parts = (
            Segment(-1 - chance.randrange(shared_prefixes), shared),
            Segment(number, total - shared),
        )
        arrivals.append(Arrival(at, tuple(part for part in parts if part.tokens), output.draw(chance)))
    return arrivals


def read_trace(path: Path, *, speedup: float = 1.0, limit: int | None = None, seed: int = 0) -> list[Arrival]:
    """The first `limit` requests of an Azure (.csv) or Mooncake (.jsonl) trace, `speedup` times as fast.

    Raises:
        NotFound: no such file.
        InvalidArgument: a line that is of neither format, by its number.
    """
    reader = _mooncake if path.suffix == ".jsonl" else _azure
    try:
        with path.open() as lines:
            arrivals = list(itertools.islice(reader(lines), limit))
    except OSError as error:
        raise NotFound(f"cannot read {path}: {error.strerror}") from error
    start = arrivals[0].at if arrivals else 0.0
    relative = [replace(arrival, at=(arrival.at - start) / speedup) for arrival in arrivals]
    return _spread_ticks(relative, random.Random(seed))


def _azure(lines: Iterable[str]) -> Iterator[Arrival]:
    """TIMESTAMP (wall clock), ContextTokens, GeneratedTokens; nothing is shared."""
    for number, row in enumerate(csv.DictReader(lines)):
        try:
            at = datetime.fromisoformat(row["TIMESTAMP"]).timestamp()
            yield Arrival(at, (Segment(number, int(row["ContextTokens"])),), max(1, int(row["GeneratedTokens"])))
        except (KeyError, ValueError, TypeError) as error:
            raise InvalidArgument(f"line {number + 2} is not of an Azure trace") from error


def _mooncake(lines: Iterable[str]) -> Iterator[Arrival]:
    """timestamp (ms), input_length, output_length, hash_ids: one for each 512 tokens of the prompt."""
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
            yield Arrival(row["timestamp"] / 1000, _blocks(row), max(1, row["output_length"]))
        except (KeyError, ValueError, TypeError) as error:
            raise InvalidArgument(f"line {number + 1} is not of a Mooncake trace") from error


def _blocks(row: dict[str, list[int]]) -> tuple[Segment, ...]:
    left = int(row["input_length"])  # type: ignore[call-overload]
    sizes = (min(MOONCAKE_BLOCK, left - start) for start in range(0, left, MOONCAKE_BLOCK))
    return tuple(Segment(id, size) for id, size in zip(row["hash_ids"], sizes, strict=True))


def _spread_ticks(arrivals: Sequence[Arrival], chance: random.Random) -> list[Arrival]:
    """Arrivals of one instant are spread up to the next: traces are quantised, and bursts of ticks are no workload."""
    ticks = [list(group) for _, group in itertools.groupby(arrivals, key=lambda arrival: arrival.at)]
    ends = [tick[0].at for tick in ticks[1:]] + [arrivals[-1].at if arrivals else 0.0]
    spread = []
    for tick, end in zip(ticks, ends, strict=True):
        later = sorted(chance.uniform(tick[0].at, max(end, tick[0].at)) for _ in tick[1:])
        spread += [replace(arrival, at=at) for arrival, at in zip(tick, [tick[0].at, *later], strict=True)]
    return spread


def fit(arrival: Arrival, max_model_len: int, max_prompt: int | None = None, max_output: int | None = None) -> Arrival:
    """The request cut to what the model's context (and the caller) allows: output first, then the prompt's end."""
    output = min(arrival.output_tokens, max_output or max_model_len, max(1, max_model_len // 2))
    room = min(max_prompt or max_model_len, max_model_len - output)
    return replace(arrival, prompt=_cut(arrival.prompt, room), output_tokens=output)


def _cut(segments: Iterable[Segment], room: int) -> tuple[Segment, ...]:
    kept = []
    for segment in segments:
        tokens = min(segment.tokens, room)
        room -= tokens
        if tokens:
            kept.append(Segment(segment.id, tokens))
    return tuple(kept)
