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

from kvmesh.errors import (
    AlreadyExists,
    DeadlineExceeded,
    InvalidArgument,
    KvmeshError,
    Mismatch,
    Overloaded,
    Unavailable,
)
from kvmesh.rpc.deadline import Deadline
from kvmesh.scheduling.load import Assignment
from kvmesh.scheduling.placement import Identity, Placement, Prompt, identity
from kvmesh.scheduling.prefix_index import prefix_hashes
from kvmesh.telemetry import Metrics
from kvmesh.types import CHUNK_TOKENS, FinishReason, Role, WorkerInfo
from kvmesh_router.claim import Claim
from kvmesh_router.events import Choice, Delta, Event, Finish, Timings
from kvmesh_router.gate import Gate
from kvmesh_router.generation import Generation
from kvmesh_router.hops import Hops
from kvmesh_router.janitor import Janitor
from kvmesh_router.model import Models, Workers, context_of
from kvmesh_router.pairing import Pairing, pair
from kvmesh_router.peers import Peers
from kvmesh_router.session import RequestAborted, Session, Sessions
from kvmesh_router.validation import Submission, validate

FATAL = (InvalidArgument, DeadlineExceeded)
"""Errors that no other worker would mend."""
REFUSALS = (Overloaded, Mismatch, AlreadyExists)
"""Errors of a worker that is alive and well."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Times in seconds. `stall`: silence that makes a worker lost. `patience`: how long to wait for a worker to come.

    `margin`: a hop's deadline comes this much earlier. `min_prefill_tokens`: shorter prompts go straight to decode.
    """

    stall: float = 5.0
    patience: float = 3.0
    margin: float = 0.1
    lease_ttl: float = 30.0
    prefill_attempts: int = 3
    min_prefill_tokens: int = 0


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
    placement: Placement = field(default_factory=Placement)
    sessions: Sessions = field(default_factory=Sessions)
    janitor: Janitor = field(default_factory=Janitor)
    policy: Policy = Policy()
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
                async with self.gate.enter(session):
                    model = await session.wait(self.models.get(submission.model))
                    context = context_of(model, self.directory.workers())
                    request = await session.wait(validate(submission, model, context))
                    generation = Generation(request, model, self.metrics, arrived)
                    self._observe()
                    yield generation.prompt_info()
                    async with aclosing(Dispatch(self, session, generation).deltas()) as deltas:
                        async for delta in deltas:
                            yield delta
                    yield generation.finish()
            except RequestAborted:
                for delta in generation.abort() if generation else ():
                    yield delta
                yield generation.finish() if generation else _aborted(submission, time.monotonic() - arrived)
            finally:
                self._count(generation)

    def check_integrity(self) -> list[str]:
        """What is wrong with the counters; empty is good."""
        admission = self.gate.admission
        problems = admission.check_integrity() + self.placement.check_integrity()
        if len(self.sessions) < admission.running + admission.waiting:
            problems.append(f"{admission.running + admission.waiting} admitted of {len(self.sessions)} requests")
        if self.placement.assigned > len(self.sessions):
            problems.append(f"{self.placement.assigned} assignments of {len(self.sessions)} requests")
        return problems

    def _count(self, generation: Generation | None) -> None:
        self.counts.requests += 1
        self.counts.tokens += generation.tokens if generation else 0
        self._observe()

    def _observe(self) -> None:
        self.metrics.num_requests_running.set(self.gate.admission.running)
        self.metrics.num_requests_waiting.set(self.gate.admission.waiting)


class Dispatch:
    """One request among the workers. `failed`: who has failed it, and how."""

    def __init__(self, flow: Flow, session: Session, generation: Generation) -> None:
        self._flow = flow
        self._session = session
        self._generation = generation
        self._request = generation.request
        self._claim = Claim(generation.request, round(flow.policy.lease_ttl * 1000))
        self._hops = Hops(flow.peers, session, generation, self._claim, flow.policy.stall, flow.policy.margin)
        self._failed: dict[Identity, KvmeshError] = {}
        self._fingerprint = ""
        self._last_resort = False
        self._attempts = 0
        self._nonce = secrets.token_hex(4)

    async def deltas(self) -> AsyncGenerator[Delta]:
        """Prefill where there is who can, then decode, elsewhere again as often as it takes."""
        try:
            attempts = self._flow.policy.prefill_attempts
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

    async def _prefill(self, assignment: Assignment) -> AsyncGenerator[Delta]:
        """One attempt; without a first token it may be made again elsewhere, with another lease."""
        ticket = self._claim.write(assignment.worker, self._stores())
        self._generation.note_dispatch()
        try:
            async with aclosing(self._hops.prefill(assignment, ticket, self._attempt_id())) as deltas:
                async for delta in deltas:
                    self._fingerprint = assignment.worker.fingerprint
                    yield delta
        except KvmeshError as error:
            self._lost(assignment.worker, error)
            if not self._generation.started:
                self._release_leases()
        finally:
            assignment.finish(self._generation.prefill_rate)

    async def _decode(self, assignment: Assignment) -> AsyncGenerator[Delta]:
        """One attempt; if the worker is lost, the next goes on from where this one came to."""
        tokens, began = self._generation.tokens, time.monotonic()
        self._generation.note_dispatch()
        try:
            async with aclosing(self._hops.decode(assignment.worker, self._attempt_id())) as deltas:
                async for delta in deltas:
                    self._fingerprint = assignment.worker.fingerprint
                    yield delta
        except KvmeshError as error:
            self._lost(assignment.worker, error)
        finally:
            gained = self._generation.tokens - tokens
            assignment.finish(gained / (time.monotonic() - began) / assignment.sequences)

    async def _prefill_worker(self) -> Assignment | None:
        """None: there is none, or none that has not failed; or the prompt is not worth it."""
        if len(self._request.prompt) < self._flow.policy.min_prefill_tokens or not self._stores():
            return None
        pairing = self._pairing()
        if pairing.mismatch:
            raise Unavailable(pairing.mismatch)
        fresh = self._fresh(pairing.prefill)
        if not fresh:
            return None
        hashes = prefix_hashes(self._request.prompt, self._request.cache_salt)
        prompt = Prompt(len(self._request.prompt), hashes, await self._stored_tokens(fresh))
        return self._flow.placement.prefill(fresh, prompt, time.monotonic())

    async def _decode_worker(self) -> Assignment:
        """The best that has not failed; waits a while for one to come, and then tries those that failed once more."""
        generation = self._generation
        samples = generation.unfinished
        context = len(self._request.prompt) * samples + generation.tokens
        patience = Deadline.after(self._flow.policy.patience)
        while True:
            workers = self._pairing().decode
            if fresh := self._fresh(workers):
                assignment = self._flow.placement.decode(fresh, context, samples, time.monotonic())
                if assignment is not None:
                    return assignment
            errors = [self._failed[identity(worker)] for worker in workers]
            refused = bool(errors) and all(isinstance(error, REFUSALS) for error in errors)
            if (refused and not generation.started) or (patience.expired and (self._last_resort or not errors)):
                raise _no_worker(self._request.model, errors)
            if patience.expired:
                self._last_resort = True
                self._failed.clear()
                continue
            await self._session.wait(self._flow.directory.wait_for_change(min(0.2, patience.remaining())))

    def _lost(self, worker: WorkerInfo, error: KvmeshError) -> None:
        """Leaves the worker for another; raises what no other would mend."""
        if isinstance(error, FATAL):
            raise error
        self._failed[identity(worker)] = error
        if not isinstance(error, REFUSALS):
            self._flow.placement.suspect(worker, time.monotonic())
            self._generation.note_recovery(worker.role)

    def _pairing(self) -> Pairing:
        """Workers that may serve the request; once a token is out, only those of the same layout."""
        directory = self._flow.directory
        return pair(
            self._request.model, directory.workers(Role.PREFILL), directory.workers(Role.DECODE), self._fingerprint
        )

    def _fresh(self, workers: Sequence[WorkerInfo]) -> list[WorkerInfo]:
        return [worker for worker in workers if identity(worker) not in self._failed]

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


def _no_worker(model: str, errors: Sequence[KvmeshError]) -> KvmeshError:
    busy = [error for error in errors if isinstance(error, Overloaded)]
    if busy and len(busy) == len(errors):
        return Overloaded(str(busy[0]), min(error.retry_after for error in busy))
    if errors:
        return Unavailable(f"no decode worker could go on with the request: {errors[-1]}")
    return Unavailable(f"no decode worker serves {model} now")


def _aborted(submission: Submission, seconds: float) -> Finish:
    """For a request that had not begun."""
    choices = [Choice(index, FinishReason.ABORTED, 0) for index in range(submission.samples)]
    return Finish(choices, timings=Timings(queue_seconds=seconds, total_seconds=seconds))
