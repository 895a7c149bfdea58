"""One request's way to its workers: who may serve it, whom the policy chooses among them, who has failed it.

Asks the policy and tells it what was measured; dispatches nothing and retries nothing: `flow.py` does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from kvmesh.errors import (
    AlreadyExists,
    DeadlineExceeded,
    InvalidArgument,
    KvmeshError,
    Mismatch,
    Overloaded,
    Unavailable,
)
from kvmesh.scheduling.load import Assignment
from kvmesh.scheduling.policy import (
    Decoded,
    Ended,
    Identity,
    Policy,
    Prefilled,
    Prompt,
    Served,
    Slo,
    Transferred,
    identity,
)
from kvmesh.scheduling.prefix_index import prefix_hashes
from kvmesh.types import WorkerInfo
from kvmesh_router.generation import Generation
from kvmesh_router.model import Workers
from kvmesh_router.pairing import Pairing, pair

FATAL = (InvalidArgument, DeadlineExceeded)
"""Errors that no other worker would mend."""
REFUSALS = (Overloaded, Mismatch, AlreadyExists)
"""Errors of a worker that is alive and well."""


class Routing:
    """`failed`: who has failed the request, and how. Binds it to a layout once a token is out."""

    def __init__(self, directory: Workers, policy: Policy, generation: Generation, slo: Slo) -> None:
        request = generation.request
        self.failed: dict[Identity, KvmeshError] = {}
        self._directory = directory
        self._policy = policy
        self._generation = generation
        self._fingerprint = ""
        self._prefill: WorkerInfo | None = None
        self._decode: WorkerInfo | None = None
        self._prompt = Prompt(
            len(request.prompt),
            prefix_hashes(request.prompt, request.cache_salt),
            key=request.request_id,
            output_tokens=request.sampling.max_tokens,
            samples=request.sampling.n,
            slo=slo,
        )

    # Choosing ----------------------------------------------------------------------------------------------------

    def admit(self) -> None:
        """
        Raises:
            Overloaded: the policy predicts that an SLO would be missed.
        """
        refused = self._policy.admit(self._pairing().workers, self._prompt, time.monotonic())
        if refused is not None:
            raise Overloaded(refused.why or "the mesh has no room for another request", refused.retry_after)

    def prefill_workers(self) -> list[WorkerInfo]:
        """Those that match a decode worker and have not failed.

        Raises:
            Unavailable: there are some, but none matches.
        """
        pairing = self._pairing()
        if pairing.mismatch:
            raise Unavailable(pairing.mismatch)
        return self._fresh(pairing.prefill)

    def note_stored(self, tokens: int) -> None:
        """So many leading tokens of the prompt are in a store."""
        self._prompt = replace(self._prompt, stored_tokens=tokens)

    def prefill(self) -> Assignment | None:
        """None: the decode worker computes the prompt."""
        return self._policy.prefill(self._fresh(self._pairing().workers), self._prompt, time.monotonic())

    def decode(self) -> Assignment | None:
        """None: everyone has failed, or nobody is there."""
        generation, samples = self._generation, self._generation.unfinished
        workers = self._fresh(self._pairing().decode)
        if not workers:
            return None
        return self._policy.decode(
            workers,
            self._prompt.tokens * samples + generation.tokens,
            samples,
            time.monotonic(),
            prompt=self._prompt,
            local=not generation.started,
        )

    def decode_errors(self) -> list[KvmeshError]:
        return [self.failed[key] for worker in self._pairing().decode if (key := identity(worker)) in self.failed]

    def bind(self, assignment: Assignment) -> None:
        """A token came from this worker: the request goes on in its layout."""
        self._fingerprint = assignment.worker.fingerprint

    def lost(self, worker: WorkerInfo, error: KvmeshError) -> None:
        """Leaves the worker for another; raises what no other would mend."""
        if isinstance(error, FATAL):
            raise error
        self.failed[identity(worker)] = error
        if not isinstance(error, REFUSALS):
            self._policy.suspect(worker, time.monotonic())
            self._generation.note_recovery(worker.role)

    def _pairing(self) -> Pairing:
        """Workers that may serve the request; once a token is out, only those of the same layout."""
        workers = self._directory.workers()
        prefill = [worker for worker in workers if worker.role.prefills]
        decode = [worker for worker in workers if worker.role.decodes]
        return pair(self._generation.request.model, prefill, decode, self._fingerprint)

    def _fresh(self, workers: Sequence[WorkerInfo]) -> list[WorkerInfo]:
        return [worker for worker in workers if identity(worker) not in self.failed]

    # Learning ----------------------------------------------------------------------------------------------------

    def prefilled(self, assignment: Assignment) -> None:
        """An attempt at a prefill worker has ended, however it did."""
        generation, worker = self._generation, assignment.worker
        assignment.finish(time.monotonic(), generation.prefill_rate)
        if generation.prefill_worker == worker.worker_id:
            self._prefill = worker
            cached = generation.usage.cached_tokens
            self._policy.observe(
                Prefilled(worker, self._prompt.tokens - cached, cached, generation.timings.prefill_seconds)
            )

    def decoded(self, assignment: Assignment, measured: Measured) -> None:
        """An attempt at a decode worker has ended, however it did."""
        self._decode = assignment.worker
        for observation in measured.observations():
            self._policy.observe(observation)
        assignment.finish(time.monotonic(), measured.rate())

    def ended(self) -> None:
        """The request is over, however it ended."""
        generation = self._generation
        if generation.started:
            ttft, tpot = generation.timings.first_token_seconds, generation.seconds_per_token
            self._policy.observe(Served(self._prompt, self._prefill, self._decode, ttft, tpot, generation.tokens))
        self._policy.observe(Ended(self._prompt))


class Measured:
    """What one decode attempt tells of its worker."""

    def __init__(self, generation: Generation, assignment: Assignment) -> None:
        self._generation = generation
        self._assignment = assignment
        self._began = time.monotonic()
        self._tokens = generation.tokens
        self._fetched = generation.usage.transferred_tokens
        self._transfer = generation.timings.transfer_seconds
        self._batch, self._context = assignment.load.sequences, assignment.load.context_tokens

    def rate(self) -> float:
        """Tokens per second of one sequence."""
        gained = self._generation.tokens - self._tokens
        return gained / max(time.monotonic() - self._began, 1e-9) / self._assignment.sequences

    def observations(self) -> list[Decoded | Transferred]:
        """The step time at the mean load of its begin and end, and what was fetched."""
        generation, assignment = self._generation, self._assignment
        worker, load = assignment.worker, assignment.load
        found: list[Decoded | Transferred] = []
        if fetched := generation.usage.transferred_tokens - self._fetched:
            found.append(Transferred(worker, fetched, generation.timings.transfer_seconds - self._transfer))
        gained = (generation.tokens - self._tokens) // assignment.sequences
        began = assignment.decoding_since
        if gained > 1 and began is not None:
            batch = (self._batch + load.sequences) / 2
            context = (self._context + load.context_tokens) / 2
            seconds = (time.monotonic() - began - generation.timings.transfer_seconds + self._transfer) / gained
            found.append(Decoded(worker, gained, seconds, batch, context, assignment.disturbed))
        return found


def no_worker(model: str, errors: Sequence[KvmeshError]) -> KvmeshError:
    """What to tell the client when nobody can generate."""
    busy = [error for error in errors if isinstance(error, Overloaded)]
    if busy and len(busy) == len(errors):
        return Overloaded(str(busy[0]), min(error.retry_after for error in busy))
    if errors:
        return Unavailable(f"no decode worker could go on with the request: {errors[-1]}")
    return Unavailable(f"no decode worker serves {model} now")
