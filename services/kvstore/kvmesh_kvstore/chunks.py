"""The nouns of the store: an offer, its traits, a stored chunk. No blob, no time, no I/O."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Self

from kvmesh.kv.bitstream import Header
from kvmesh.kv.codec import CODECS


class Tier(StrEnum):
    MEMORY = "memory"
    DISK = "disk"
    REMOTE = "remote"


@dataclass(frozen=True, slots=True)
class Offer:
    """A chunk as its owner describes it; `parent` is empty for the first chunk of a prompt, `size` in bytes.

    `tenant`: whose it is; empty for a prompt without a salt.
    """

    key: bytes
    fingerprint: str
    size: int
    parent: bytes = b""
    tail: bool = False
    tenant: bytes = b""

    @property
    def continues(self) -> tuple[bytes, bytes]:
        """The chunk that this one keeps from being evicted: its parent, if that is of the same tenant."""
        return self.tenant, self.parent


@dataclass(frozen=True, slots=True)
class Traits:
    """What a bitstream says of itself. `layer_ends`: of the quality layers that are here, in bytes; the last is all."""

    codec: int
    raw_bytes: int
    layer_ends: tuple[int, ...]

    @classmethod
    def of(cls, header: Header, size: int) -> Self:
        """`size`: of the bitstream, which may be a prefix of what was encoded."""
        return cls(header.codec, header.array_bytes, tuple(end for end in header.layer_ends if end <= size))

    @property
    def quality(self) -> str:
        """For people: the codec and, if it is progressive, how many quality layers are here."""
        format = CODECS[self.codec]
        return format.name if format.quality_layers == 1 else f"{format.name}:{len(self.layer_ends)}"

    def end(self, layers: int) -> int:
        """The bytes of so many quality layers, or of as many as there are; 0: of all."""
        return self.layer_ends[min(layers or len(self.layer_ends), len(self.layer_ends)) - 1]


@dataclass(eq=False, slots=True)
class Entry:
    """A stored chunk. `serial` tells its blob from an earlier one of the same key."""

    offer: Offer
    traits: Traits
    serial: int
    tier: Tier
    pins: set[str] = field(default_factory=set)
    """The leases that hold it."""
    owner: str | None = None
    """The lease that a tail goes with."""
    readers: int = 0
    hot: bool = False
    """More than one request has asked for it."""

    @property
    def key(self) -> bytes:
        return self.offer.key

    @property
    def size(self) -> int:
        return self.offer.size

    @contextmanager
    def being_read(self) -> Iterator[None]:
        """It may not be evicted meanwhile."""
        self.readers += 1
        try:
            yield
        finally:
            self.readers -= 1

    @property
    def continued_as(self) -> tuple[bytes, bytes]:
        """What `Offer.continues` is of its continuations."""
        return self.offer.tenant, self.offer.key
