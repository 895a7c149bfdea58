"""Where bitstreams lie: bytes in a dict, files in a folder.

Everything here blocks: the disk's methods belong in a pool. Blobs are named by key and serial, so that deleting an old
blob can never hit a newer one of the same key. Knows no lease, no budget and no order of eviction.

A file is one header (the offer, with a CRC-32 of its own) and the bitstream. It is written under another name and then
renamed: a file that has its final name is whole, and `scan` after a crash finds no half of one.
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

from kvmesh.errors import Unavailable
from kvmesh_kvstore.chunks import Entry, Offer

_MAGIC = b"KVMF"
_VERSION = 1
_FIELDS = struct.Struct("<4sHH32s32s?Q")
_CRC = struct.Struct("<I")
_HEADER_BYTES = _FIELDS.size + _CRC.size
_NAME = re.compile(r"([0-9a-f]{64})\.([0-9a-f]{1,16})(\.part)?")
_NO_PARENT = bytes(32)
MemoryTier = dict[int, bytes]
"""Serial to bitstream."""


@dataclass(frozen=True, slots=True)
class Found:
    """A file that a scan found, its header sound and its length right."""

    offer: Offer
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
                for piece in (_header(entry.offer), memoryview(bitstream)):
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
            file.seek(_header_bytes(entry.offer))
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


def _header(offer: Offer) -> bytes:
    name = offer.fingerprint.encode()
    parent = offer.parent or _NO_PARENT
    fields = _FIELDS.pack(_MAGIC, _VERSION, len(name), offer.key, parent, offer.tail, offer.size)
    return fields + _CRC.pack(crc32(fields + name)) + name


def _header_bytes(offer: Offer) -> int:
    return _HEADER_BYTES + len(offer.fingerprint.encode())


def _examine(path: Path, key: bytes, serial: int) -> Found | None:
    """What a file holds; None if it is not a whole blob of that key, or a tail, whose lease died with the process."""
    if path.suffix == ".part":
        return None
    with path.open("rb") as file:
        head = file.read(_HEADER_BYTES)
        if len(head) < _HEADER_BYTES:
            return None
        fields, (crc,) = head[: _FIELDS.size], _CRC.unpack(head[_FIELDS.size :])
        magic, version, length, named, parent, tail, size = _FIELDS.unpack(fields)
        name = file.read(length)
        status = os.fstat(file.fileno())
    sound = (magic, version, named, crc) == (_MAGIC, _VERSION, key, crc32(fields + name))
    if not sound or tail or status.st_size != _HEADER_BYTES + length + size:
        return None
    return Found(Offer(key, name.decode(), size, parent if parent != _NO_PARENT else b""), serial, status.st_mtime)
