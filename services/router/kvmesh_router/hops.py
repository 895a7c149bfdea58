"""One attempt at one worker: what the router asks of it, and what its answers mean for the generation.

Reads streams under the session's deadline and the policy's patience with silence. Retries nothing: an error ends the
attempt, and `flow.py` decides.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, replace
from math import inf
from typing import TypeVar

from kvmesh.errors import Unavailable
from kvmesh.rpc.stream import stream
from kvmesh.scheduling.load import Assignment
from kvmesh.types import KvTicket, WorkerInfo
from kvmesh_router.claim import Claim
from kvmesh_router.events import Delta
from kvmesh_router.generation import Generation
from kvmesh_router.peers import Peers, decode_request, prefill_request
from kvmesh_router.session import Session

Message = TypeVar("Message")


@dataclass(frozen=True, slots=True)
class Hops:
    """`stall`: silence in seconds that makes a worker lost. `margin`: a hop's deadline comes this much earlier.

    `ttft`: seconds from arrival until the first token is due.
    """

    peers: Peers
    session: Session
    generation: Generation
    claim: Claim
    stall: float
    margin: float
    ttft: float = inf

    async def prefill(self, assignment: Assignment, ticket: KvTicket, attempt_id: str) -> AsyncGenerator[Delta]:
        """First tokens; ends once all is published, or no sample is left to go on."""
        worker, generation = assignment.worker, self.generation
        self.claim.give(ticket, worker, attempt_id)
        readers, budget = self.peers.links.of(ticket.sources), generation.budget(self.ttft)
        request = prefill_request(generation.request, attempt_id, worker.fingerprint, ticket, readers, budget)
        stub = self.peers.at(worker).prefill
        async with stream(stub.Prefill(request, timeout=self._timeout())) as call:
            messages = aiter(call)
            while (message := await self._next(messages, worker)) is not None:
                match message.WhichOneof("event"):
                    case "first_tokens":
                        generation.note_first_tokens(worker.worker_id, message.first_tokens)
                        assignment.first_token(time.monotonic())
                        self.claim.expect(ticket)
                        for delta in generation.take(message.first_tokens.samples):
                            yield delta
                        if not generation.unfinished:
                            return
                    case "published":
                        generation.timings.publish_seconds = message.published.publish_seconds
                        self.claim.expect(replace(ticket, chunks=ticket.chunks[: message.published.chunks]))
                        return
        raise Unavailable(f"{worker.worker_id} ended the prefill early")

    async def decode(self, assignment: Assignment, attempt_id: str) -> AsyncGenerator[Delta]:
        """Tokens from where the samples are; ends once every sample has."""
        worker, generation, ticket = assignment.worker, self.generation, self.claim.for_decode()
        generation.decode_worker = worker.worker_id
        samples = generation.unfinished_samples()
        budget = generation.budget(self.ttft)
        request = decode_request(generation.request, attempt_id, worker.fingerprint, ticket, samples, budget)
        stub = self.peers.at(worker).decode
        async with stream(stub.Decode(request, timeout=self._timeout())) as call:
            messages = aiter(call)
            while (message := await self._next(messages, worker)) is not None:
                if message.HasField("started"):
                    generation.note_started(message.started)
                    self.peers.links.note(worker, message.started.fetched.link_bytes_per_second)
                    if ticket is not None:
                        self.claim.taken_over()
                if assignment.prompt_tokens and message.samples:
                    assignment.first_token(time.monotonic())
                for delta in generation.take(message.samples):
                    yield delta
                if not generation.unfinished:
                    return
        raise Unavailable(f"{worker.worker_id} ended the generation early")

    async def _next(self, messages: AsyncIterator[Message], worker: WorkerInfo) -> Message | None:
        return await self.session.wait(anext(messages, None), self.stall, worker.worker_id)

    def _timeout(self) -> float:
        return self.session.deadline.earlier(self.margin).remaining()
