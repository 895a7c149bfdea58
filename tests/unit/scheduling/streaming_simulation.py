"""A stream of chunks over a modelled link, with the real policy and estimator: what the time would have been."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvmesh.scheduling.compute import ComputeSpeed
from kvmesh.scheduling.link import Link
from kvmesh.scheduling.streaming import Offer, Outlook, Streaming, Version

CHUNK = 256
ELEMENTS = 11_520 * CHUNK
"""Of a chunk of SmolLM2."""
STEP = 0.001
"""Seconds between changes of the link."""


def offers(count: int, bits: Sequence[float], decode: float = 0.0) -> list[Offer]:
    """`count` chunks in versions of so many bits an element; each takes `decode` seconds to decode."""
    versions = tuple(Version(i, int(ELEMENTS * b / 8), decode) for i, b in enumerate(bits, start=1))
    return [Offer(i * CHUNK, (i + 1) * CHUNK, versions, ELEMENTS) for i in range(count)]


def speed(tokens_per_second: float, per_pair: float = 0.0) -> ComputeSpeed:
    """A measured one."""
    result = ComputeSpeed()
    for start, end in ((0, 64), (0, 512), (1024, 1536), (2048, 2560), (0, 4096)):
        seconds = (end - start) / tokens_per_second + per_pair * (end**2 - start**2) / 2
        result.observe(start, end, seconds)
    return result


@dataclass
class Outcome:
    seconds: float = 0.0
    loss: float = 0.0
    qualities: list[int] = field(default_factory=list)
    """Of the chunks fetched; the rest was computed."""


def send(size: float, at: float, link: Callable[[float], float]) -> float:
    """When `size` bytes have passed that begin at `at`; the link may change every STEP."""
    while size > (part := link(at) * STEP):
        size, at = size - part, at + STEP
    return at + size / link(at)


def adaptive(policy: Streaming, chunks: Sequence[Offer], link: Callable[[float], float], measured: Link) -> Outcome:
    """One chunk asked for at a time, decoded while the next is on its way."""
    outcome, now, ready = Outcome(), 0.0, 0.0
    for index, chunk in enumerate(chunks):
        version = policy.next(chunks[index:], Outlook(measured.share, 0.0, max(0.0, ready - now)), now)
        if version is None:
            break
        begun = measured.begin(now)
        now = send(version.size, now, link)
        measured.end(begun, version.size, now)
        ready = max(ready, now) + version.decode_seconds
        outcome.qualities.append(version.layers)
        outcome.loss += chunk.loss(version)
    start = CHUNK * len(outcome.qualities)
    outcome.seconds = max(ready, now) + policy.compute.seconds(start, policy.prompt)
    return outcome


def fixed(chunks: Sequence[Offer], quality: int, link: Callable[[float], float], compute: ComputeSpeed) -> Outcome:
    """All chunks in one version; quality 0: all computed."""
    sent = ready = loss = 0.0
    for chunk in chunks if quality else ():
        version = chunk.version(quality)
        sent = send(version.size, sent, link)
        ready = max(ready, sent) + version.decode_seconds
        loss += chunk.loss(version)
    start = chunks[-1].end if quality else 0
    return Outcome(ready + compute.seconds(start, chunks[-1].end + 1), loss, [quality] * len(chunks))
