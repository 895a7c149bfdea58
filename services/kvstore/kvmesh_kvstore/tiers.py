"""Where bitstreams lie: bytes in a dict, files in a folder.

Everything here blocks: the disk's methods belong in a pool. Blobs are named by key and serial, so that deleting an old
blob can never hit a newer one of the same key. Knows no lease, no budget and no order of eviction.

A file is a label and the bitstream. It is written under another name and then
renamed: a file that has its final name is whole, and `scan` after a crash finds no half of one.
"""

from __future__ import annotations

import fcntl
import os
import re
from dataclasses import dataclass
from pathlib import Path

from kvmesh.errors import Unavailable
from kvmesh.kv.bitstream import HEAD_BYTES, CorruptChunk, read_header
from kvmesh_kvstore.chunks import Entry, Offer, Traits
from kvmesh_kvstore.label import MAX_LABEL_BYTES, label_bytes, pack, unpack

_NAME = re.compile(r"([0-9a-f]{64})\.([0-9a-f]{1,16})(\.part)?")
MemoryTier = dict[int, bytes]
"""Serial to bitstream."""


@dataclass(frozen=True, slots=True)
class Found:
    """A file that a scan found, its headers sound and its length right."""

    offer: Offer
    traits: Traits
    serial: int
    modified: float


class DiskTier:
    """Files under `root`/xx/ by the first byte of the key. One process may own a root at a time."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def open(self) -> None:
        """Takes the folder, creating it. Raises Unavailable: not writable, or another process has it."""
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise Unavailable(f"{self._root} is in use by another kvstore") from error
        except OSError as error:
            raise Unavailable(f"cannot keep chunks in {self._root}: {error.strerror}") from error

    def close(self) -> None:
        os.close(self._lock)

    def write(self, entry: Entry, bitstream: bytes) -> None:
        """Stores a blob; nothing is left of it if that fails. Raises OSError."""
        path = self._path(entry)
        part = path.with_suffix(path.suffix + ".part")
        path.parent.mkdir(exist_ok=True)
        try:
            with part.open("wb", buffering=0) as file:
                for piece in (pack(entry.offer), memoryview(bitstream)):
                    written = 0
                    while written < len(piece):
                        written += file.write(piece[written:]) or 0
            part.rename(path)
        except OSError:
            part.unlink(missing_ok=True)
            raise

    def read(self, entry: Entry) -> bytes:
        """A blob, whatever its state: verifying is the caller's. Raises OSError, FileNotFoundError among them."""
        with self._path(entry).open("rb", buffering=0) as file:
            file.seek(label_bytes(entry.offer))
            return file.read(entry.size + 1)  # one more, so that a file that grew is seen to be wrong

    def delete(self, entry: Entry) -> None:
        self._path(entry).unlink(missing_ok=True)

    def scan(self) -> list[Found]:
        """Every sound blob, the longest unused first. Other files of its own are deleted, strange ones not."""
        found = []
        for path in self._root.glob("[0-9a-f][0-9a-f]/*"):
            if not (name := _NAME.fullmatch(path.name)):
                continue
            if sound := _examine(path, bytes.fromhex(name[1]), int(name[2], 16)):
                found.append(sound)
            else:
                path.unlink(missing_ok=True)
        return sorted(found, key=lambda each: (each.modified, each.serial))

    def serials(self) -> set[int]:
        """Of all files that a store wrote here, unfinished ones included."""
        names = (_NAME.fullmatch(path.name) for path in self._root.glob("[0-9a-f][0-9a-f]/*"))
        return {int(name[2], 16) for name in names if name}

    def _path(self, entry: Entry) -> Path:
        name = entry.key.hex()
        return self._root / name[:2] / f"{name}.{entry.serial:x}"


def _examine(path: Path, key: bytes, serial: int) -> Found | None:
    """What a file holds; None if it is not a whole blob of that key, or a tail, whose lease died with the process."""
    if path.suffix == ".part":
        return None
    with path.open("rb") as file:
        head = file.read(MAX_LABEL_BYTES + HEAD_BYTES)
        status = os.fstat(file.fileno())
    offer = unpack(head)
    if offer is None or offer.key != key or offer.tail or status.st_size != label_bytes(offer) + offer.size:
        return None
    try:
        header = read_header(head[label_bytes(offer) :])
    except CorruptChunk:
        return None
    return Found(offer, Traits.of(header, offer.size), serial, status.st_mtime)
