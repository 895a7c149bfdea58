"""What the units of kvmesh.worker stand on in tests: a store in memory, and jobs of the fake model."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from kvmesh.engine.api import Sample
from kvmesh.engine.fake import FAKE_VOCABULARY, fake_engine, fake_layout
from kvmesh.kv.keys import fingerprint
from kvmesh.kv.reading import Observe
from kvmesh.kv.ticket import write_ticket
from kvmesh.types import ChunkRef, ChunkSource, KvTicket, SamplingParams
from kvmesh.worker.job import Job, Model

LAYOUT = fake_layout(fake_engine(blocks=1).layout)
FINGERPRINT = fingerprint(LAYOUT)
MODEL = Model("fake", FINGERPRINT, LAYOUT, FAKE_VOCABULARY, fake_engine(blocks=1024).capacity)


def ticket(tokens: Sequence[int], lease_id: str = "lease", ttl_ms: int = 30_000) -> KvTicket:
    return write_ticket(
        fingerprint=FINGERPRINT,
        salt="",
        tokens=tokens,
        layers=(0, 2),
        sources=[ChunkSource("store", "nowhere:1")],
        lease_id=lease_id,
        ttl_ms=ttl_ms,
    )


def job(tokens: int = 600, **changes: object) -> Job:
    prompt = tuple(i % 250 for i in range(tokens))
    fields: dict[str, object] = {
        "request_id": "r",
        "model": "fake",
        "fingerprint": FINGERPRINT,
        "prompt": prompt,
        "samples": (Sample(0),),
        "sampling": SamplingParams(max_tokens=8, temperature=0),
        "ticket": ticket(prompt),
    }
    return Job(**{**fields, **changes})  # type: ignore[arg-type]


class MemoryStore:
    """The interface of StoreClient over a dict. `refuse`: keys it does not take; `hang`: puts never end."""

    def __init__(self) -> None:
        self.chunks: dict[bytes, bytes] = {}
        self.refuse: set[bytes] = set()
        self.hang = False
        self.leases: set[str] = set()
        self.calls: list[str] = []

    async def acquire(self, ticket: KvTicket) -> frozenset[int]:
        self.calls.append("acquire")
        self.leases.add(ticket.lease_id)
        return frozenset({0})

    async def renew(self, ticket: KvTicket) -> frozenset[int]:
        self.calls.append("renew")
        return frozenset({0})

    async def release(self, ticket: KvTicket) -> None:
        self.calls.append("release")
        self.leases.discard(ticket.lease_id)

    async def find_missing(self, ticket: KvTicket, chunks: Sequence[ChunkRef]) -> set[bytes]:
        return {chunk.key for chunk in chunks} - set(self.chunks)

    async def put(self, ticket: KvTicket, index: int, bitstream: bytes, *, timeout: float) -> bool:
        self.calls.append(f"put {index}")
        if self.hang:
            await asyncio.Event().wait()
        key = ticket.chunks[index].key
        if key not in self.refuse:
            self.chunks[key] = bitstream
        return key not in self.refuse

    async def get(
        self, ticket: KvTicket, chunks: Sequence[ChunkRef], *, timeout_per_chunk: float, observe: Observe
    ) -> AsyncIterator[tuple[ChunkRef, bytes | None]]:
        for chunk in chunks:
            self.calls.append(f"get {chunk.start}")
            await asyncio.sleep(0)
            yield chunk, self.chunks.get(chunk.key)
