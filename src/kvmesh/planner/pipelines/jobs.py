"""Requests, and the pieces of them that travel from host to host. Knows neither hosts nor time."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from kvmesh.scheduling.interleaved import Route


@dataclass(slots=True, eq=False)
class Request:
    """Prompt and output tokens, and how far it is. `asked` is when its present step was (prompt, or one token)."""

    prompt: int
    output: int
    asked: float
    route: Route | None = None
    produced: int = 0

    @property
    def hosts(self) -> tuple[int, ...]:
        assert self.route is not None
        return self.route.hosts


@dataclass(slots=True, eq=False)
class Job:
    """One step's work on its way: `tokens` of a prompt (all, or a chunk) or one decode; at `hop` of its route."""

    request: Request
    tokens: int
    decode: bool
    last: bool = True
    hop: int = 0
    left: float = 0.0
    """When it left the host before this one."""


def chunks(request: Request, size: int | None) -> list[Job]:
    """A prompt whole, or in chunks of at most `size` tokens, alike in size."""
    parts = 1 if size is None else -(-request.prompt // size)
    bounds = [request.prompt * part // parts for part in range(parts + 1)]
    pairs = zip(bounds, islice(bounds, 1, None), strict=False)
    return [Job(request, end - start, False, end == request.prompt) for start, end in pairs]
