"""One prefill, as a story: reserve, look around, compute, answer, publish.

Knows no proto. A store that is dead, slow or wrong costs bounded time and the publishing, never the first token.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from kvmesh.engine.api import Event, KvReady, TokenOutput
from kvmesh.rpc.deadline import Deadline
from kvmesh.types import ChunkRef, TokenBatch
from kvmesh.worker.job import Job
from kvmesh.worker.publication import Publication
from kvmesh.worker.session import Session
from kvmesh.worker.tokens import batches
from kvmesh.worker.transfer import Imported
from kvmesh.worker.worker import Worker

PUBLISH_SECONDS = 10.0
"""How long publishing may outlast the computation."""


@dataclass(frozen=True, slots=True)
class FirstTokens:
    samples: tuple[TokenBatch, ...]
    queue_seconds: float
    compute_seconds: float
    local_tokens: int
    stored_tokens: int
    imported: Imported


@dataclass(frozen=True, slots=True)
class Published:
    """`chunks`: leading chunks of the ticket that can be fetched; `reason`: why not all, or empty."""

    chunks: int
    seconds: float
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Prompt tokens that need not be computed, and the indices of the chunks that the store lacks."""

    local: int
    stored: int = 0
    missing: frozenset[int] = frozenset()
    imported: Imported = field(default_factory=lambda: Imported(0))


class Prefill:
    """The flow of one worker; its methods share nothing but the worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    async def run(self, job: Job, deadline: Deadline, send: Callable[[FirstTokens], Awaitable[None]]) -> Published:
        """Sends the first tokens as soon as they are there; returns once all that can be published is.

        On any failure or cancellation the engine and the lease are let go; on success the lease is left to decode.
        """
        arrived = time.monotonic()
        worker = self._worker
        async with worker.sessions.open(job.request_id, deadline) as session:
            await worker.engine.add(job.engine_request(load_kv=True, prefill_only=True))
            local = min((await session.admitted()).cached_tokens, job.loadable_tokens)
            async with worker.leases.hold(job.ticket, hand_over=True) as granted:
                limit = None if job.ttft_budget is None else arrived + job.ttft_budget
                plan = await self._look_around(job, local, limit) if granted else Plan(local)
                async with worker.publication(job, plan.missing if granted else None) as publication:
                    await worker.engine.start(job.request_id, plan.local + plan.stored, publication.ranges)
                    samples = await self._first_tokens(job, session, publication)
                    await send(self._answer(job, samples, plan, arrived, session))
                    return await self._finish(job, publication)

    async def _look_around(self, job: Job, local: int, limit: float | None) -> Plan:
        """Asks the store what it has; imports the stored prefix where it reaches beyond the local one."""
        ticket, chunks = job.ticket, job.chunks
        if ticket is None or not chunks:
            return Plan(local)
        keys = await self._worker.store.find_missing(ticket, chunks)
        missing = {index for index, chunk in enumerate(chunks) if chunk.key in keys}
        stored = _beyond(chunks[: min(missing, default=len(chunks))], local)
        if not stored:
            return Plan(local, 0, frozenset(missing))
        prompt = len(job.prompt)
        imported = await self._worker.importer.fetch(job.request_id, ticket, stored, local, prompt=prompt, limit=limit)
        if imported.missed:
            missing.add(chunks.index(stored[imported.chunks]))
        reached = min(imported.end, job.loadable_tokens)
        self._worker.traffic.recomputed_tokens += min(stored[-1].end, job.loadable_tokens) - reached
        return Plan(local, max(0, reached - local), frozenset(missing), imported)

    async def _first_tokens(self, job: Job, session: Session, publication: Publication) -> tuple[TokenBatch, ...]:
        """Publishes what becomes final until each sample has its token; the engine has then forgotten the request."""
        outputs: list[Event] = []
        while len(outputs) < len(job.samples):
            for event in await session.events():
                if isinstance(event, KvReady):
                    publication.offer(event)
                elif isinstance(event, TokenOutput):
                    outputs.append(event)
        return tuple(batches(outputs))

    def _answer(
        self, job: Job, samples: tuple[TokenBatch, ...], plan: Plan, arrived: float, session: Session
    ) -> FirstTokens:
        began = session.computing_at or arrived
        seconds = time.monotonic() - began
        self._worker.traffic.compute.observe(plan.local + plan.stored, len(job.prompt), seconds)
        return FirstTokens(samples, began - arrived, seconds, plan.local, plan.stored, plan.imported)

    async def _finish(self, job: Job, publication: Publication) -> Published:
        began = time.monotonic()
        chunks, reason = await publication.finish(PUBLISH_SECONDS)
        if job.ticket and not chunks:
            self._worker.leases.release_soon(job.ticket)
        return Published(chunks, time.monotonic() - began, reason)


def _beyond(chunks: Sequence[ChunkRef], local: int) -> list[ChunkRef]:
    return [chunk for chunk in chunks if chunk.end > local]
