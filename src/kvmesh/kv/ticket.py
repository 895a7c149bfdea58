"""Writing the claim check: which chunks a prompt's KV consists of and who is to hold each.

Pure: a ticket can be written before the prefill has run. Knows nothing of what the sources really hold. A ticket names
one range of layers; the fingerprint must say which if workers hold different ones, for the keys do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

from kvmesh.kv.keys import chain, namespace_root, tail_key
from kvmesh.types import CHUNK_TOKENS, ChunkRef, ChunkSource, KvTicket


def write_ticket(
    *,
    fingerprint: str,
    salt: str,
    tokens: Sequence[int],
    layers: tuple[int, int],
    sources: Sequence[ChunkSource],
    lease_id: str,
    ttl_ms: int,
) -> KvTicket:
    """The ticket for all of `tokens`: full chunks, then the tail if any. Without a source it names no chunk."""
    root = namespace_root(fingerprint, salt)
    keys = chain(root, tokens, CHUNK_TOKENS)
    rest = tokens[len(keys) * CHUNK_TOKENS :]
    if rest:
        keys.append(tail_key(keys[-1] if keys else root, rest, lease_id))
    chunks = [
        ChunkRef(key, start, min(CHUNK_TOKENS, len(tokens) - start), *layers, source=rendezvous(key, sources))
        for key, start in zip(keys, range(0, len(tokens), CHUNK_TOKENS), strict=True)
        if sources
    ]
    return KvTicket(fingerprint, lease_id, ttl_ms, tuple(chunks), tuple(sources))


def rendezvous(key: bytes, sources: Sequence[ChunkSource]) -> int:
    """The source with the highest hash for this key (Thaler & Ravishankar, 1998): a change moves few chunks."""
    return max(range(len(sources)), key=lambda i: sha256(sources[i].worker_id.encode() + b"\0" + key).digest())


def parent_of(ticket: KvTicket, i: int) -> bytes:
    """The key of the chunk before chunk `i`; empty for the first."""
    return ticket.chunks[i - 1].key if i else b""
