"""What is known of one generation: its samples, its clock, its counts. Everything that its client is told at the end.

Knows no worker and waits for nothing: `flow.py` does.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from math import isinf

from kvmesh.errors import InvalidArgument, KvmeshError
from kvmesh.rpc.convert import token_batch_from_proto
from kvmesh.telemetry import Metrics
from kvmesh.v1 import common_pb2, decode_pb2, prefill_pb2
from kvmesh_router.best_of import BestOf
from kvmesh_router.events import Choice, Delta, Finish, PromptInfo, Request, Timings, Usage
from kvmesh_router.model import Model
from kvmesh_router.output import SampleOutput


class Generation:
    """`arrived` and all times: readings of `time.monotonic()`."""

    def __init__(self, request: Request, model: Model, metrics: Metrics, arrived: float) -> None:
        self.request = request
        self.outputs = _outputs(request, model)
        self.unfinished = len(self.outputs)
        self.timings = Timings()
        self.usage = Usage(prompt_tokens=len(request.prompt))
        self.recoveries = 0
        self.prefill_worker = self.decode_worker = ""
        self._best_of = BestOf(request.best_of.keep, request.best_of.logprobs) if request.best_of else None
        self._metrics = metrics
        self._arrived = arrived
        self._first = self._last = 0.0
        self._kept: list[Choice] = []

    @property
    def tokens(self) -> int:
        """Generated so far, all samples together."""
        return sum(len(output.tokens) for output in self.outputs)

    @property
    def started(self) -> bool:
        """The client has seen a token."""
        return self._first > 0

    def unfinished_samples(self) -> list[SampleOutput]:
        return [output for output in self.outputs if output.choice is None]

    def prompt_info(self) -> PromptInfo:
        request = self.request
        shown = request.prompt if request.response.prompt_token_ids else ()
        return PromptInfo(request.request_id, request.model, len(request.prompt), request.sampling.seed, shown)

    def take(self, batches: Iterable[common_pb2.TokenBatch]) -> Iterator[Delta]:
        """A worker's tokens as deltas.

        Raises:
            KvmeshError: a sample that is not there, or tokens were skipped.
        """
        for proto in batches:
            if proto.index >= len(self.outputs):
                raise KvmeshError(f"a worker sent tokens of sample {proto.index} of {len(self.outputs)}")
            output = self.outputs[proto.index]
            if output.choice is not None:
                continue
            try:
                delta = output.take(token_batch_from_proto(proto))
            except InvalidArgument as error:  # The worker's fault, not the client's.
                raise KvmeshError(f"a worker sent tokens that cannot be read: {error}") from error
            self.unfinished -= output.choice is not None
            if delta is not None:
                self._count(len(delta.token_ids))
                if self._best_of:
                    self._best_of.hold(delta)
                else:
                    yield delta

    def held_back(self) -> Iterator[Delta]:
        """What is given out only now that every sample has ended."""
        if self._best_of:
            deltas, self._kept = self._best_of.best(self._choices())
            yield from deltas

    def abort(self) -> Iterator[Delta]:
        """Ends all samples; yields the text held back."""
        for output in self.outputs:
            delta = output.abort()
            if delta is None:
                continue
            if self._best_of:
                self._best_of.hold(delta)
            else:
                yield delta
        self.unfinished = 0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens computed per second; 0 if not measured."""
        computed = len(self.request.prompt) - self.usage.cached_tokens
        return computed / self.timings.prefill_seconds if self.timings.prefill_seconds > 0 else 0.0

    def note_dispatch(self) -> None:
        """A worker is about to be asked."""
        if not self.timings.queue_seconds:
            self.timings.queue_seconds = time.monotonic() - self._arrived

    def note_recovery(self, phase: str) -> None:
        """A worker was lost, and the request goes on."""
        self.recoveries += 1
        self._metrics.request_recoveries.add(1, {"phase": phase})

    def note_first_tokens(self, worker_id: str, message: prefill_pb2.PrefillFirstTokens) -> None:
        self.prefill_worker = worker_id
        self.timings.prefill_queue_seconds = message.queue_seconds
        self.timings.prefill_seconds = message.compute_seconds
        self.usage.cached_tokens = message.local_tokens + message.stored_tokens
        self._note_fetched(message.fetched)

    def note_started(self, message: decode_pb2.DecodeStarted) -> None:
        self.timings.decode_queue_seconds += message.queue_seconds
        self.timings.transfer_seconds += message.transfer_seconds
        self.usage.transferred_tokens += message.fetched_tokens
        self.usage.recomputed_tokens += message.recomputed_tokens
        if message.fetched_tokens:
            self._metrics.kv_transfer_seconds.record(message.transfer_seconds)
            self._metrics.kv_transfer_bytes.record(message.fetched.bytes)
        self._note_fetched(message.fetched)

    def budget(self, ttft: float) -> float | None:
        """Seconds left of `ttft` until the first token is due; None once it is out, or if there is no limit."""
        return None if self.started or isinf(ttft) else max(0.0, self._arrived + ttft - time.monotonic())

    @property
    def seconds_per_token(self) -> float:
        """Mean time of each token after the first, of the longest sample so far."""
        longest = max(len(output.tokens) for output in self.outputs)
        return (self._last - self._first) / (longest - 1) if longest > 1 else 0.0

    def finish(self) -> Finish:
        """The last event. Every sample must have ended."""
        now = time.monotonic()
        self.timings.total_seconds = now - self._arrived
        self.timings.per_token_seconds = self.seconds_per_token
        self.usage.completion_tokens = self.tokens
        choices = self._kept or self._choices()
        self._record_finish(finish := Finish(
            choices, self.usage, self.timings, self.recoveries, self.prefill_worker, self.decode_worker
        ))  # fmt: skip
        return finish

    def _choices(self) -> list[Choice]:
        return [output.choice for output in self.outputs if output.choice is not None]

    def _note_fetched(self, message: common_pb2.KvFetched) -> None:
        self.usage.fetched_bytes += message.bytes
        for quality, chunks in message.chunks_by_quality.items():
            self.usage.chunks_by_quality[quality] = self.usage.chunks_by_quality.get(quality, 0) + chunks

    def _count(self, tokens: int) -> None:
        now = time.monotonic()
        if not self._first:
            self._first = now
            self.timings.first_token_seconds = now - self._arrived
            self._metrics.time_to_first_token_seconds.record(now - self._arrived)
        elif tokens:
            self._metrics.inter_token_latency_seconds.record((now - self._last) / tokens)
        self._last = now

    def _record_finish(self, finish: Finish) -> None:
        metrics = self._metrics
        metrics.e2e_request_latency_seconds.record(finish.timings.total_seconds)
        metrics.request_queue_time_seconds.record(finish.timings.queue_seconds)
        metrics.prompt_tokens.add(finish.usage.prompt_tokens)
        metrics.generation_tokens.add(finish.usage.completion_tokens)
        for choice in finish.choices:
            metrics.request_success.add(1, {"finished_reason": choice.reason.value})


def _outputs(request: Request, model: Model) -> list[SampleOutput]:
    wanted = request.response.text or request.stop
    decode = model.tokenizer.decode_all if request.response.include_special_tokens else model.tokenizer.decode
    return [
        SampleOutput(index, decode if wanted else None, request.stop, request.sampling.min_tokens)
        for index in range(request.sampling.n)
    ]
