"""What a worker moved between itself and stores, and what links and decoding have shown themselves to be. No I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod

from kvmesh.kv.bitstream import Header, read_header
from kvmesh.kv.codec import CODECS
from kvmesh.rpc.address import same_host
from kvmesh.scheduling.coding import CodingSpeed
from kvmesh.scheduling.compute import ComputeSpeed
from kvmesh.scheduling.link import Link
from kvmesh.scheduling.publishing import Publishing
from kvmesh.types import ChunkSource, KvTicket, WorkerStatistics
from kvmesh.worker.job import Speed


def quality_of(codec: int, layers: int) -> str:
    """How counters name it: "raw", or "transform:2" for two quality layers of a codec that has more."""
    name = CODECS[codec].name
    return f"{name}:{layers}" if CODECS[codec].quality_layers > 1 else name


@dataclass(slots=True)
class Moved:
    """Chunks and their bytes; `raw_bytes`: what the same KV would have been."""

    qualities: Counter[str] = field(default_factory=Counter)
    bytes: int = 0
    raw_bytes: int = 0

    def add(self, quality: str, size: int, raw_size: int) -> None:
        self.qualities[quality] += 1
        self.bytes += size
        self.raw_bytes += raw_size


@dataclass(slots=True)
class Traffic:
    """Of one worker. `address`: its own, empty if it has none: then nothing is remote.

    `threads`: that encode and decode. `floor`: the coarsest quality of a chunk to fetch.
    """

    address: Callable[[], str] = str
    threads: int = 1
    floor: int = 1
    fetched: Moved = field(default_factory=Moved)
    published: Moved = field(default_factory=Moved)
    missed_chunks: int = 0
    recomputed_tokens: int = 0
    compute: ComputeSpeed = field(default_factory=ComputeSpeed)
    publishing: Publishing = field(default_factory=Publishing)
    decoding: CodingSpeed = field(init=False)
    encoding: CodingSpeed = field(init=False)
    _down: dict[str, Link] = field(default_factory=dict)
    _up: dict[str, Link] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.decoding, self.encoding = CodingSpeed(self.threads), CodingSpeed(self.threads)

    def expect(self, speed: Speed) -> None:
        """What to reckon with until requests have shown better."""
        self.compute.observe(0, speed.tokens, speed.compute_seconds)
        for coding in speed.coding:
            header = self.encoded(coding.bits, coding.encode_seconds)
            layers = min(self.floor, len(header.layer_ends))
            self.decoding.observe(header.codec, layers, prod(header.shape), coding.decode_seconds)

    def encoded(self, bits: bytes, seconds: float) -> Header:
        """One thread made this bitstream in so long."""
        header = read_header(bits)
        coarsest = header.layer_ends[min(self.floor, len(header.layer_ends)) - 1]
        self.encoding.observe(header.codec, 1, prod(header.shape), seconds)
        self.publishing.observe(header.codec, header.array_bytes, len(bits), coarsest)
        return header

    def remote(self, source: ChunkSource) -> bool:
        own = self.address()
        return bool(own) and not same_host(own, source.address)

    def down(self, source: ChunkSource) -> Link:
        """The link that brings what the source has."""
        return self._down.setdefault(source.address, Link())

    def up(self, source: ChunkSource) -> Link:
        """The link that takes what the source is given."""
        return self._up.setdefault(source.address, Link())

    def slowest(self, ticket: KvTicket) -> float:
        """Bytes per second of the slowest link to a remote source of the ticket; 0 if none was measured."""
        links = [self.down(source).capacity for source in ticket.sources if self.remote(source)]
        return min((rate for rate in links if rate), default=0.0)

    def report(self, statistics: WorkerStatistics) -> None:
        """Writes the counters into a reading."""
        statistics.chunks_by_quality = dict(self.fetched.qualities)
        statistics.fetched_bytes_total, statistics.fetched_raw_bytes_total = self.fetched.bytes, self.fetched.raw_bytes
        statistics.published_bytes_total = self.published.bytes
        statistics.published_raw_bytes_total = self.published.raw_bytes
        statistics.missed_chunks_total = self.missed_chunks
        statistics.recomputed_tokens_total = self.recomputed_tokens
