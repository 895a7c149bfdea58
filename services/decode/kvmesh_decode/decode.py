"""One decode, as a story: reserve, fetch, go on from there, relay.

Blocks are reserved before a byte is pulled, so that a full worker queues requests and not their KV. Whatever cannot be
fetched is computed here, and the client is told why. Knows no proto.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from kvmesh.rpc.deadline import Deadline
from kvmesh.types import KvTicket, TokenBatch
from kvmesh.worker.job import Job
from kvmesh.worker.session import Session
from kvmesh.worker.tokens import batches
from kvmesh.worker.transfer import Imported
from kvmesh.worker.worker import Worker

NO_TICKET = "no KV was offered"
NO_SOURCE = "no source of the ticket answers"
SHORT = "the KV offered ends before the sequence does"


@dataclass(frozen=True, slots=True)
class Started:
    """How the prompt's KV was had, in tokens and seconds."""

    queue_seconds: float
    transfer_seconds: float
    local_tokens: int
    fetched_tokens: int
    recomputed_tokens: int
    reason: str
    imported: Imported


Send = Callable[[Started | list[TokenBatch]], Awaitable[None]]


class Decode:
    """The flow of one worker; its methods share nothing but the worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    async def run(self, job: Job, deadline: Deadline, send: Send) -> None:
        """Sends Started, then tokens until every sample has ended. On any failure engine and lease are let go."""
        arrived = time.monotonic()
        async with self._worker.sessions.open(job.request_id, deadline) as session:
            await self._worker.engine.add(job.engine_request(load_kv=bool(job.chunks)))
            # Held from now on: the KV must outlive the wait for blocks.
            async with self._worker.leases.hold(job.ticket, hand_over=False) as granted:
                cached = (await session.admitted()).cached_tokens
                admitted = time.monotonic()
                limit = None if job.ttft_budget is None else arrived + job.ttft_budget
                imported = await self._load(job, granted, cached, limit)
            started = _started(job, cached, imported, admitted - arrived, time.monotonic() - admitted)
            self._worker.traffic.recomputed_tokens += started.recomputed_tokens if job.chunks else 0
            await send(started)
            await self._relay(job, session, send, max(cached, imported.end))

    async def _load(self, job: Job, granted: bool, cached: int, limit: float | None) -> Imported:
        """Fetches what the local pool lacks and starts the request."""
        if job.ticket is None or not job.chunks:
            return Imported(cached, reason=NO_TICKET)
        imported = await self._fetch(job, job.ticket, cached, limit) if granted else Imported(cached, reason=NO_SOURCE)
        await self._worker.engine.start(job.request_id, imported.end)
        return imported

    async def _fetch(self, job: Job, ticket: KvTicket, cached: int, limit: float | None) -> Imported:
        wanted = [chunk for chunk in ticket.chunks if chunk.end > cached] if cached < job.loadable_tokens else []
        if not wanted:
            return Imported(cached)
        prompt = len(job.prompt)
        return await self._worker.importer.fetch(job.request_id, ticket, wanted, cached, prompt=prompt, limit=limit)

    async def _relay(self, job: Job, session: Session, send: Send, computed: int) -> None:
        """The first token at once, then whatever became ready while the last message was on its way."""
        running = {sample.index for sample in job.samples}
        while running:
            ready = batches(await session.events())
            if ready and computed < len(job.prompt):
                began = session.computing_at or time.monotonic()
                self._worker.traffic.compute.observe(computed, len(job.prompt), time.monotonic() - began)
                computed = len(job.prompt)
            if ready:
                await send(ready)
            running -= {batch.index for batch in ready if batch.finish_reason}


def _started(job: Job, cached: int, imported: Imported, queued: float, transfer: float) -> Started:
    local = min(cached, len(job.prompt))
    fetched = max(0, min(imported.end, len(job.prompt)) - local)
    recomputed = recomputed_tokens(job, max(cached, imported.end))
    reason = (imported.reason or SHORT) if recomputed else ""
    return Started(queued, transfer, local, fetched, recomputed, reason, imported)


def recomputed_tokens(job: Job, computed: int) -> int:
    """Tokens whose KV is computed here though a worker had it before, or could have had.

    The last token of prompt and output always is, for its logits: it does not count. `computed` exceeds the prompt
    where a single resumed sample finds its own output in the local pool.
    """
    prompt = max(0, job.loadable_tokens - computed)
    outputs = sum(max(0, len(sample.tokens) - 1) for sample in job.samples)
    return prompt + max(0, outputs - max(0, computed - len(job.prompt)))
