"""Writing the claim check: which chunks a prompt's KV consists of and who is to hold each.

Pure: a ticket can be written before the prefill has run. Knows nothing of what the sources really hold. A ticket names
one range of layers; the fingerprint must say which if workers hold different ones, for the keys do not.

Placement is rendezvous hashing (Thaler & Ravishankar, 1998): each key ranks all sources, and its owners are the first
`replicas` of them. So a source that joins takes over only what it wins, and whoever it drove out comes next in rank:
readers find there what was put before.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

from kvmesh.kv.keys import chain, namespace_root, tail_key, tenant_of
from kvmesh.types import CHUNK_TOKENS, ChunkRef, ChunkSource, KvTicket

FORMER_OWNERS = 1
"""Sources behind the owners that readers ask too: as many as may have joined since a chunk was put."""


def write_ticket(
    *,
    fingerprint: str,
    salt: str,
    tokens: Sequence[int],
    layers: tuple[int, int],
    sources: Sequence[ChunkSource],
    lease_id: str,
    ttl_ms: int,
    replicas: int = 1,
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
    return KvTicket(fingerprint, lease_id, ttl_ms, tuple(chunks), tuple(sources), replicas, tenant_of(salt))


def rendezvous(key: bytes, sources: Sequence[ChunkSource]) -> int:
    """The source of the highest rank for this key."""
    return max(range(len(sources)), key=lambda i: _score(key, sources[i]))


def ranking(key: bytes, sources: Sequence[ChunkSource]) -> list[int]:
    """All sources, the highest rank for this key first."""
    return sorted(range(len(sources)), key=lambda i: _score(key, sources[i]), reverse=True)


def owners(ticket: KvTicket, chunk: ChunkRef) -> tuple[int, ...]:
    """The sources that are to hold a chunk, the first to be asked first."""
    return candidates(ticket, chunk)[: ticket.replicas]


def candidates(ticket: KvTicket, chunk: ChunkRef) -> tuple[int, ...]:
    """The sources that may have a chunk: its owners, then former ones."""
    others = [source for source in ranking(chunk.key, ticket.sources) if source != chunk.source]
    return (chunk.source, *others)[: ticket.replicas + FORMER_OWNERS]


def parent_of(ticket: KvTicket, i: int) -> bytes:
    """The key of the chunk before chunk `i`; empty for the first."""
    return ticket.chunks[i - 1].key if i else b""


def _score(key: bytes, source: ChunkSource) -> bytes:
    return sha256(source.worker_id.encode() + b"\0" + key).digest()
