"""Adaptive streaming: how good a version of the next chunk to fetch, or whether to compute the rest from its text.

After CacheGen (SIGCOMM 2024), Algorithm 1: what the link gives and what is left of the time decide, chunk by chunk. A
chunk can be computed only once the KV of those before it is there, so what is recomputed is always a suffix: a plan
streams the next chunks in one version and computes the rest. Its time is reckoned as it passes: chunks follow one
another over the link, each is decoded while later ones are on the way, then the rest is computed.

- With a time limit: the least loss of all plans that keep it with some margin; if none does, the fastest.
- Without: the least loss that takes hardly longer than the fastest.

Mended where Algorithm 1 breaks: the limit is one for the whole stream, so a link that slows down costs quality and not
time; a chunk that stalls is given up when waiting has cost what computing costs (`patience`); the throughput is a
request's share. Pure: knows no clock, no bytes and no codec.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

LOOK_AHEAD = 64
"""Chunks that a plan reckons one by one; what lies beyond is reckoned as one."""
MARGIN = 0.4
"""Of the time that is left, kept for surprises: with a tenth, 11 of 12 requests over a varying link came late."""
FREE = 0.02
"""Without a limit, how much longer than the fastest plan a better one may take."""
SHORTEST_PATIENCE = 1.0
PATIENCE = 4.0
"""A chunk is not late before it took so many times what was expected."""


@dataclass(frozen=True, slots=True)
class Version:
    """One way to have a chunk: its first `layers` quality layers."""

    layers: int
    size: int
    """Bytes."""
    decode_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Offer:
    """A chunk that is stored: tokens [start, end), versions from coarse to fine, at least one."""

    start: int
    end: int
    versions: tuple[Version, ...]
    elements: int = 1
    """Numbers of KV in it."""

    def version(self, quality: int) -> Version:
        """The `quality`-th version, or the finest if there are fewer."""
        return self.versions[min(quality, len(self.versions)) - 1]

    def loss(self, version: Version) -> float:
        """Distortion at the version's rate, for all tokens: six decibels a bit for any codec, exact from 5 bits."""
        bits: float = 8 * version.size / self.elements
        return (self.end - self.start) * round(math.pow(4, -bits), 3)


class Compute(Protocol):
    """What is needed of `kvmesh.scheduling.compute.ComputeSpeed`."""

    @property
    def measured(self) -> bool: ...

    def seconds(self, start: int, end: int) -> float: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """Fetch the first `chunks` chunks in version `quality`, compute the rest: done in `seconds`."""

    chunks: int
    quality: int
    seconds: float
    loss: float


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is known when deciding. `throughput`: the request's share in bytes per second, None if not measured.

    `wire`: seconds until the link is free of what was asked for before; `decoder`: until the decoder is.
    """

    throughput: float | None
    wire: float = 0.0
    decoder: float = 0.0


@dataclass(slots=True)
class Streaming:
    """The choices of one request. `floor`: the coarsest quality to fetch; `limit`: when the prompt should be computed.

    `prompt`: its tokens. All times are seconds of one monotonic clock.
    """

    prompt: int
    compute: Compute
    floor: int = 1
    limit: float | None = None
    _pace: float = field(default=math.inf)

    def next(self, offers: Sequence[Offer], outlook: Outlook, now: float) -> Version | None:
        """The version of the first of `offers` (consecutive chunks, not yet asked for); None: compute from there."""
        if not outlook.throughput:
            return offers[0].version(self.floor)
        plan = self.plan(offers, outlook, now)
        return offers[0].version(plan.quality) if plan.chunks else None

    def whole(self, offers: Sequence[Offer], outlook: Outlook, now: float) -> bool:
        """Is it best to fetch them all, and has each but one version? Then nothing is left to decide."""
        if not outlook.throughput or any(len(offer.versions) > 1 for offer in offers):
            return False
        return self.plan(offers, outlook, now).chunks == len(_horizon(offers))

    def plan(self, offers: Sequence[Offer], outlook: Outlook, now: float) -> Plan:
        """The best of all plans, as things stand."""
        plans = list(plans_of(_horizon(offers), outlook, self.compute, self.prompt, self.floor))
        fastest = min(plans, key=lambda plan: (plan.seconds, plan.loss))
        good = [plan for plan in plans if plan.seconds <= self._time_left(fastest, now)]
        return min(good, key=lambda plan: (plan.loss, plan.seconds), default=fastest)

    def patience(self, offer: Offer, expected: float, now: float) -> float:
        """Seconds that the chunk may take, of which `expected` are likely, before the rest is computed instead.

        Waiting as long as computing would take costs at most twice the better of both, whatever the link does: the ski
        rental's bound. A limit that can still be kept by computing comes before it. Infinite: nothing is known better.
        """
        if not self.compute.measured:
            return math.inf
        computing = self.compute.seconds(offer.start, self.prompt)
        left = math.inf if self.limit is None else self.limit - now - computing
        worth = left if 0 < left < computing else computing
        return max(worth, PATIENCE * expected, SHORTEST_PATIENCE)

    def _time_left(self, fastest: Plan, now: float) -> float:
        """Seconds that a plan may take; without a limit the first decision sets the pace, and later ones may cut it."""
        if self.limit is not None:
            return (self.limit - now) * (1 - MARGIN)
        self._pace = min(self._pace, now + fastest.seconds * (1 + FREE))
        return self._pace - now


def plans_of(
    offers: Sequence[Offer], outlook: Outlook, compute: Compute, prompt: int, floor: int = 1
) -> Iterator[Plan]:
    """Every split of `offers` in every quality from `floor` on; computing counts only if its speed is known."""
    finest = max(len(offer.versions) for offer in offers)
    if compute.measured:
        yield Plan(0, 0, max(outlook.wire, outlook.decoder) + compute.seconds(offers[0].start, prompt), 0.0)
    for quality in range(min(floor, finest), finest + 1):
        sent, ready, loss = outlook.wire, outlook.decoder, 0.0
        for chunks, offer in enumerate(offers, start=1):
            version = offer.version(quality)
            sent += version.size / (outlook.throughput or math.inf)
            ready = max(ready, sent) + version.decode_seconds
            loss += offer.loss(version)
            if compute.measured or chunks == len(offers):
                yield Plan(chunks, quality, ready + compute.seconds(offer.end, prompt), loss)


def _horizon(offers: Sequence[Offer]) -> Sequence[Offer]:
    """At most LOOK_AHEAD offers and one for all others."""
    near, far = offers[:LOOK_AHEAD], offers[LOOK_AHEAD:]
    if not far:
        return near
    finest = max(len(offer.versions) for offer in far)
    together = [[offer.version(quality) for offer in far] for quality in range(1, finest + 1)]
    versions = tuple(
        Version(quality, sum(v.size for v in same), sum(v.decode_seconds for v in same))
        for quality, same in enumerate(together, start=1)
    )
    return [*near, Offer(far[0].start, far[-1].end, versions, sum(offer.elements for offer in far))]
