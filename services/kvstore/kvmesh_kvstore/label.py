"""What stands before a bitstream wherever it lies outside of memory: the offer that it came with, under a CRC-32.

Little-endian: magic "KVMF", version, length of the fingerprint, key, parent, tenant, tail, size of the bitstream; the
CRC-32 of all this and the fingerprint; the fingerprint. A parent or tenant of zeros is none. Knows no file and no tier.
"""

from __future__ import annotations

import struct
from zlib import crc32

from kvmesh_kvstore.chunks import Offer

_MAGIC = b"KVMF"
_VERSION = 2
_FIELDS = struct.Struct("<4sHH32s32s16s?Q")
_CRC = struct.Struct("<I")
_FIXED_BYTES = _FIELDS.size + _CRC.size
_NO_PARENT, _NO_TENANT = bytes(32), bytes(16)
MAX_LABEL_BYTES = _FIXED_BYTES + 4 * 128


def pack(offer: Offer) -> bytes:
    name = offer.fingerprint.encode()
    fields = _FIELDS.pack(
        _MAGIC,
        _VERSION,
        len(name),
        offer.key,
        offer.parent or _NO_PARENT,
        offer.tenant or _NO_TENANT,
        offer.tail,
        offer.size,
    )
    return fields + _CRC.pack(crc32(fields + name)) + name


def label_bytes(offer: Offer) -> int:
    return _FIXED_BYTES + len(offer.fingerprint.encode())


def unpack(head: bytes) -> Offer | None:
    """The offer at the beginning of `head`, which need not be longer than MAX_LABEL_BYTES; None: it is damaged."""
    if len(head) < _FIXED_BYTES:
        return None
    fields, (crc,) = head[: _FIELDS.size], _CRC.unpack_from(head, _FIELDS.size)
    magic, version, length, key, parent, tenant, tail, size = _FIELDS.unpack(fields)
    name = head[_FIXED_BYTES : _FIXED_BYTES + length]
    if (magic, version, crc) != (_MAGIC, _VERSION, crc32(fields + name)) or len(name) < length:
        return None
    parent, tenant = parent if parent != _NO_PARENT else b"", tenant if tenant != _NO_TENANT else b""
    return Offer(key, name.decode(), size, parent, tail, tenant)
