"""Engine outputs as messages: whatever is ready becomes one batch a sample. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from kvmesh.engine.api import Event, TokenOutput
from kvmesh.types import TokenBatch


def batches(events: Iterable[Event]) -> list[TokenBatch]:
    """One batch for each sample that has tokens among `events`, by index; other events are passed over."""
    samples: dict[int, list[TokenOutput]] = {}
    for event in events:
        if isinstance(event, TokenOutput):
            samples.setdefault(event.index, []).append(event)
    return [_batch(samples[index]) for index in sorted(samples)]


def _batch(outputs: list[TokenOutput]) -> TokenBatch:
    first, last = outputs[0], outputs[-1]
    logprobs = tuple(output.logprobs for output in outputs if output.logprobs)
    token_ids = tuple(output.token_id for output in outputs)
    return TokenBatch(first.index, first.offset, token_ids, logprobs, last.finish_reason, last.matched_stop_token)
