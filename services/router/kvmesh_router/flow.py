"""The story of a request: admit → tokenize → place → prefill → decode → relay.

The only place of retry, deadline, cancellation and failover. A worker that fails is left for another: before the first
token the prefill is dispatched again, after it a decode worker goes on from the tokens so far, which the client never
notices but by the time it takes. KV bytes do not pass here: prefill and decode meet at the stores named in the ticket.
Knows no proto and no text.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from kvmesh.errors import KvmeshError
from kvmesh.rpc.deadline import Deadline
from kvmesh.scheduling.load import Assignment
from kvmesh.scheduling.placement import Placement
from kvmesh.scheduling.policy import Policy, Slo
from kvmesh.telemetry import Metrics
from kvmesh.types import CHUNK_TOKENS, FinishReason, Role, WorkerInfo
from kvmesh_router.claim import Claim
from kvmesh_router.events import Choice, Delta, Event, Finish, Timings
from kvmesh_router.gate import Gate
from kvmesh_router.generation import Generation
from kvmesh_router.hops import Hops
from kvmesh_router.janitor import Janitor
from kvmesh_router.model import Models, Workers, context_of
from kvmesh_router.peers import Peers
from kvmesh_router.routing import REFUSALS, Measured, Routing, no_worker
from kvmesh_router.session import RequestAborted, Session, Sessions
from kvmesh_router.validation import Submission, validate


@dataclass(frozen=True, slots=True)
class Limits:
    """Times in seconds. `stall`: silence that makes a worker lost. `patience`: how long to wait for a worker to come.

    `margin`: a hop's deadline comes this much earlier. `min_prefill_tokens`: shorter prompts go straight to decode.
    `slo`: of requests that name none.
    """

    stall: float = 5.0
    patience: float = 3.0
    margin: float = 0.1
    lease_ttl: float = 30.0
    replicas: int = 1
    prefill_attempts: int = 3
    min_prefill_tokens: int = 0
    slo: Slo = field(default_factory=Slo)


Stored = Callable[[Sequence[bytes]], Awaitable[int]]
"""How many of these leading chunks some store has."""


async def nothing_stored(keys: Sequence[bytes]) -> int:
    """In place of an index of stored chunks."""
    return 0


@dataclass(slots=True)
class Counts:
    """Since the start: requests ended, tokens relayed."""

    requests: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Flow:
    """Serves requests; one per router."""

    directory: Workers
    models: Models
    gate: Gate
    peers: Peers
    metrics: Metrics
    policy: Policy = field(default_factory=Placement)
    sessions: Sessions = field(default_factory=Sessions)
    janitor: Janitor = field(default_factory=Janitor)
    limits: Limits = Limits()
    stored: Stored = nothing_stored
    counts: Counts = field(default_factory=Counts)

    async def run(self, submission: Submission, deadline: Deadline) -> AsyncGenerator[Event]:
        """PromptInfo, Deltas, Finish; leaving early frees everything.

        Raises:
            InvalidArgument, NotFound, AlreadyExists, Overloaded, Unavailable, DeadlineExceeded: as the proto says.
        """
        arrived, generation = time.monotonic(), None
        with self.sessions.open(submission.request_id, deadline) as session:
            try:
                async with self.gate.enter(session, submission.low_priority):
                    model = await session.wait(self.models.get(submission.model))
                    context = context_of(model, self.directory.workers())
                    request = await session.wait(validate(submission, model, context))
                    generation = Generation(request, model, self.metrics, arrived)
                    self._observe()
                    yield generation.prompt_info()
                    async with aclosing(Dispatch(self, session, generation).deltas()) as deltas:
                        async for delta in deltas:
                            yield delta
                    for delta in generation.held_back():
                        yield delta
                    yield generation.finish()
            except RequestAborted:
                for delta in (*generation.abort(), *generation.held_back()) if generation else ():
                    yield delta
                yield generation.finish() if generation else _aborted(submission, time.monotonic() - arrived)
            finally:
                self._count(generation)

    def check_integrity(self) -> list[str]:
        """What is wrong with the counters; empty is good."""
        admission = self.gate.admission
        problems = admission.check_integrity() + self.policy.check_integrity()
        if len(self.sessions) < admission.running + admission.waiting:
            problems.append(f"{admission.running + admission.waiting} admitted of {len(self.sessions)} requests")
        if self.policy.assigned > len(self.sessions):
            problems.append(f"{self.policy.assigned} assignments of {len(self.sessions)} requests")
        return problems

    def _count(self, generation: Generation | None) -> None:
        self.counts.requests += 1
        self.counts.tokens += generation.tokens if generation else 0
        self._observe()

    def _observe(self) -> None:
        self.metrics.num_requests_running.set(self.gate.admission.running)
        self.metrics.num_requests_waiting.set(self.gate.admission.waiting)


class Dispatch:
    """One request among the workers."""

    def __init__(self, flow: Flow, session: Session, generation: Generation) -> None:
        self._flow = flow
        self._session = session
        self._generation = generation
        self._request = generation.request
        self._claim = Claim(generation.request, round(flow.limits.lease_ttl * 1000), flow.limits.replicas)
        limits, slo = flow.limits, generation.request.objectives.over(flow.limits.slo)
        self._hops = Hops(flow.peers, session, generation, self._claim, limits.stall, limits.margin, slo.ttft)
        self._routing = Routing(flow.directory, flow.policy, generation, slo)
        self._last_resort = False
        self._attempts = 0
        self._nonce = secrets.token_hex(4)

    async def deltas(self) -> AsyncGenerator[Delta]:
        """Prefill where there is who can, then decode, elsewhere again as often as it takes."""
        try:
            self._routing.admit()
            attempts = self._flow.limits.prefill_attempts
            while not self._generation.started and attempts and (prefill := await self._prefill_worker()):
                async with aclosing(self._prefill(prefill)) as deltas:
                    async for delta in deltas:
                        yield delta
                attempts -= 1
            while self._generation.unfinished:
                async with aclosing(self._decode(await self._decode_worker())) as deltas:
                    async for delta in deltas:
                        yield delta
        finally:
            self._release_leases()
            self._routing.ended()

    async def _prefill(self, assignment: Assignment) -> AsyncGenerator[Delta]:
        """One attempt; without a first token it may be made again elsewhere, with another lease."""
        ticket = self._claim.write(assignment.worker, self._stores())
        self._generation.note_dispatch()
        try:
            async with aclosing(self._hops.prefill(assignment, ticket, self._attempt_id())) as deltas:
                async for delta in deltas:
                    self._routing.bind(assignment)
                    yield delta
        except KvmeshError as error:
            self._routing.lost(assignment.worker, error)
            if not self._generation.started:
                self._release_leases()
        finally:
            self._routing.prefilled(assignment)

    async def _decode(self, assignment: Assignment) -> AsyncGenerator[Delta]:
        """One attempt; if the worker is lost, the next goes on from where this one came to."""
        measured = Measured(self._generation, assignment)
        self._generation.note_dispatch()
        try:
            async with aclosing(self._hops.decode(assignment, self._attempt_id())) as deltas:
                async for delta in deltas:
                    self._routing.bind(assignment)
                    yield delta
        except KvmeshError as error:
            self._routing.lost(assignment.worker, error)
        finally:
            self._routing.decoded(assignment, measured)

    async def _prefill_worker(self) -> Assignment | None:
        """None: there is none, or none that has not failed; or the prompt is not worth it, or is a beam search's."""
        routing, stores = self._routing, self._stores()
        if len(self._request.prompt) < self._flow.limits.min_prefill_tokens or not stores:
            return None
        if self._request.sampling.beam_width:
            return None
        if workers := routing.prefill_workers():
            routing.note_stored(await self._stored_tokens(workers))
            return routing.prefill()
        return None

    async def _decode_worker(self) -> Assignment:
        """The best that has not failed; waits a while for one to come, and then tries those that failed once more."""
        generation, routing = self._generation, self._routing
        patience = Deadline.after(self._flow.limits.patience)
        while True:
            if assignment := routing.decode():
                return assignment
            errors = routing.decode_errors()
            refused = bool(errors) and all(isinstance(error, REFUSALS) for error in errors)
            if (refused and not generation.started) or (patience.expired and (self._last_resort or not errors)):
                raise no_worker(self._request.model, errors)
            if patience.expired:
                self._last_resort = True
                routing.failed.clear()
                continue
            await self._session.wait(self._flow.directory.wait_for_change(min(0.2, patience.remaining())))

    def _stores(self) -> list[WorkerInfo]:
        return self._flow.directory.workers(Role.KVSTORE)

    async def _stored_tokens(self, workers: Sequence[WorkerInfo]) -> int:
        """Leading tokens that a store has; asked only where the answer can change the choice."""
        if len(workers) < 2 or len(self._request.prompt) < CHUNK_TOKENS:
            return 0
        ticket = self._claim.write(workers[0], self._stores())
        keys = [chunk.key for chunk in ticket.chunks if not chunk.tail]
        return CHUNK_TOKENS * await self._session.wait(self._flow.stored(keys))

    def _attempt_id(self) -> str:
        """Names one attempt at one worker: two routers may have requests of equal id."""
        self._attempts += 1
        return f"{self._request.request_id}.{self._nonce}.{self._attempts}"

    def _release_leases(self) -> None:
        for lease in self._claim.give_up():
            self._flow.janitor.take("the release of a lease", self._flow.peers.release(lease))


def _aborted(submission: Submission, seconds: float) -> Finish:
    """For a request that had not begun."""
    choices = [Choice(index, FinishReason.ABORTED, 0) for index in range(submission.samples)]
    return Finish(choices, timings=Timings(queue_seconds=seconds, total_seconds=seconds))
