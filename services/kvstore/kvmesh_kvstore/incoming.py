"""From the parts of a PutChunks stream to whole chunks.

Pure: one `feed` for each part, in order. Knows sizes and order, not what the bytes mean. Nothing is allocated on the
word of a sender: parts are kept as they come and joined once.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvmesh.errors import InvalidArgument
from kvmesh.kv.bitstream import MAX_BITSTREAM_BYTES
from kvmesh.kv.keys import KEY_BYTES
from kvmesh.types import TENANT_BYTES
from kvmesh_kvstore.chunks import Offer

MAX_FRAME_BYTES = 1 << 20
MAX_KEYS = 4096
MAX_NAME_CHARACTERS = 128


@dataclass(frozen=True, slots=True)
class Arrival:
    """A whole chunk, of exactly the size on offer; without its bytes if they were not to be kept."""

    offer: Offer
    bitstream: bytes


class Assembly:
    """One put stream."""

    def __init__(self) -> None:
        self._offer: Offer | None = None
        self._parts: list[bytes] | None = None
        self._left = 0

    def check(self, offer: Offer) -> None:
        """Raises InvalidArgument for a header that is out of place or malformed."""
        self._require(self._offer is None, "header", "comes before the chunk ahead of it is whole")
        check_key("key", offer.key)
        self._require(offer.parent == b"" or len(offer.parent) == KEY_BYTES, "parent_key", "must be 32 bytes or empty")
        self._require(offer.parent != offer.key, "parent_key", "must not be the key itself")
        self._require(0 < offer.size <= MAX_BITSTREAM_BYTES, "size", f"must be in [1, {MAX_BITSTREAM_BYTES}]")
        self._require(len(offer.tenant) in (0, TENANT_BYTES), "tenant", f"must be {TENANT_BYTES} bytes or empty")
        named = 0 < len(offer.fingerprint) <= MAX_NAME_CHARACTERS
        self._require(named, "fingerprint", f"must have 1 to {MAX_NAME_CHARACTERS} characters")

    def open(self, offer: Offer, keep: bool) -> None:
        """A header that was checked. `keep` false: read the chunk's bytes past."""
        self._offer, self._left = offer, offer.size
        self._parts = [] if keep else None

    def feed(self, data: bytes) -> Arrival | None:
        """A part of the open chunk; the chunk if that was the last. Raises InvalidArgument."""
        offer = self._offer
        if offer is None:
            raise InvalidArgument(violations=[("data", "comes before a header")])
        self._require(0 < len(data) <= MAX_FRAME_BYTES, "data", f"must have 1 to {MAX_FRAME_BYTES} bytes")
        self._require(len(data) <= self._left, "data", "goes beyond the size in the header")
        self._left -= len(data)
        if self._parts is not None:
            self._parts.append(data)
        if self._left:
            return None
        bitstream = b"".join(self._parts or ())
        self._offer = self._parts = None
        return Arrival(offer, bitstream)

    def end(self) -> None:
        """The stream's end. Raises InvalidArgument if a chunk is unfinished."""
        self._require(self._offer is None, "data", "ends before the chunk is whole")

    @staticmethod
    def _require(good: bool, name: str, text: str) -> None:
        if not good:
            raise InvalidArgument(violations=[(name, text)])


def check_key(name: str, key: bytes) -> None:
    """Raises InvalidArgument unless a key has its 32 bytes."""
    Assembly._require(len(key) == KEY_BYTES, name, f"must be {KEY_BYTES} bytes")
