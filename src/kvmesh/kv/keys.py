"""Content addresses of KV chunks: SHA-256 chains over token ids, rooted in a namespace.

Knows no ticket, no store and no model: a namespace is whatever the fingerprint and the salt say. Only SHA-256 over
explicit bytes, never the builtin `hash`: two processes must agree (LMCache#2511), and nobody may compute a collision.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from hashlib import sha256

from kvmesh.types import TENANT_BYTES

KEY_BYTES = 32


def fingerprint(layout: Mapping[str, str]) -> str:
    """Hex SHA-256 of a layout (model, tokenizer, RoPE, dtype, shape, codec family …), in whatever order it is given."""
    return sha256(json.dumps(dict(layout), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def namespace_root(fingerprint: str, salt: str) -> bytes:
    """Where the chains of a namespace start. A tenant's salt enters here only: the chain spreads it."""
    name = fingerprint.encode()
    return sha256(b"kvmesh.namespace\0" + struct.pack("<I", len(name)) + name + salt.encode()).digest()


def tenant_of(salt: str) -> bytes:
    """What stores know the owner of a salt by, TENANT_BYTES of a hash: they count his chunks, and learn no salt."""
    return sha256(b"kvmesh.tenant\0" + salt.encode()).digest()[:TENANT_BYTES] if salt else b""


def chain(root: bytes, tokens: Sequence[int], step: int) -> list[bytes]:
    """One key of 32 bytes for each full `step` tokens; each covers everything before it. The rest has no key."""
    keys, parent = [], root
    for start in range(0, len(tokens) - step + 1, step):
        parent = sha256(b"kvmesh.chunk\0" + parent + _packed(tokens[start : start + step])).digest()
        keys.append(parent)
    return keys


def tail_key(parent: bytes, tokens: Sequence[int], lease_id: str) -> bytes:
    """The key of what remains after the last full chunk; the lease makes it private to one request."""
    lease = lease_id.encode()
    return sha256(b"kvmesh.tail\0" + parent + struct.pack("<I", len(lease)) + lease + _packed(tokens)).digest()


def _packed(tokens: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(tokens)}I", *tokens)
