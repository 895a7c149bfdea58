"""One sample on its way to the client: tokens in, deltas out, each position exactly once.

Checks offsets, makes text, finds stop strings. Survives the worker that generates: the next one goes on from `tokens`.
Knows no worker and no connection.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvmesh.errors import KvmeshError
from kvmesh.types import FinishReason, PositionLogprobs, TokenBatch
from kvmesh_router.detokenizer import Decode, Detokenizer
from kvmesh_router.events import Choice, Delta
from kvmesh_router.stopping import Checked, StopChecker

Logprobs = tuple[PositionLogprobs, ...]


class TokenGap(KvmeshError):
    """A worker skipped output positions."""


class SampleOutput:
    """`decode` is None when no text is wanted. Stop strings need text; no stop string ends before `min_tokens`."""

    def __init__(self, index: int, decode: Decode | None, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self.index = index
        self.tokens: list[int] = []
        self.choice: Choice | None = None
        self._text = Detokenizer(decode) if decode else None
        self._stops = StopChecker(stop) if stop else None
        self._min_tokens = min_tokens

    def take(self, batch: TokenBatch) -> Delta | None:
        """Adds a worker's batch. None: nothing new in it.

        Raises:
            TokenGap: the batch starts beyond the tokens so far.
        """
        if self.choice is not None:
            return None
        known = len(self.tokens) - batch.offset
        if known < 0:
            raise TokenGap(f"sample {self.index} went from token {len(self.tokens)} to {batch.offset}")
        token_ids = batch.token_ids[known:] if known else batch.token_ids
        if not token_ids and batch.finish_reason is None:
            return None
        return self._extend(token_ids, batch, batch.logprobs[known:] if known else batch.logprobs)

    def abort(self) -> Delta | None:
        """Ends the sample where it is; the text held back, if any."""
        if self.choice is not None:
            return None
        self._end(FinishReason.ABORTED)
        text = self._rest().text
        return Delta(self.index, len(self.tokens), text, ()) if text else None

    def _extend(self, token_ids: tuple[int, ...], batch: TokenBatch, logprobs: Logprobs) -> Delta:
        checked, used = self._read(token_ids, silent_last=batch.matched_stop_token is not None)
        if checked.matched is not None:
            token_ids, logprobs = token_ids[:used], logprobs[:used]
        self.tokens.extend(token_ids)
        if checked.matched is None and batch.finish_reason is not None:
            rest = self._rest()
            checked = Checked(checked.text + rest.text, rest.matched)
        if checked.matched is not None:
            self._end(FinishReason.STOP, stop=checked.matched)
        elif batch.finish_reason is not None:
            self._end(batch.finish_reason, stop_token_id=batch.matched_stop_token)
        return Delta(self.index, len(self.tokens), checked.text, token_ids, logprobs)

    def _read(self, token_ids: tuple[int, ...], silent_last: bool) -> tuple[Checked, int]:
        """Their text, and how many of them it took to reach a stop string. A stop token shows no text."""
        if self._text is None:
            return Checked(""), len(token_ids)
        shown = token_ids[:-1] if silent_last else token_ids
        if self._stops is None:
            return Checked(self._text.feed(shown) if shown else ""), len(token_ids)
        return self._read_to_stop(self._text, self._stops, shown)

    def _read_to_stop(self, text: Detokenizer, stops: StopChecker, token_ids: tuple[int, ...]) -> tuple[Checked, int]:
        """All at once; if a stop string is in it, again token by token to find where."""
        unarmed = max(0, min(self._min_tokens - 1 - len(self.tokens), len(token_ids)))
        head = stops.feed(text.feed(token_ids[:unarmed]), armed=False).text if unarmed else ""
        before = text.fork(), stops.fork()
        checked = stops.feed(text.feed(token_ids[unarmed:])) if unarmed < len(token_ids) else Checked("")
        if checked.matched is None:
            return Checked(head + checked.text), len(token_ids)
        text, stops = before
        for used, token_id in enumerate(token_ids[unarmed:], start=unarmed + 1):
            checked = stops.feed(text.feed((token_id,)))
            head += checked.text
            if checked.matched is not None:
                return Checked(head, checked.matched), used
        raise AssertionError("a stop string was there at once and not token by token")

    def _rest(self) -> Checked:
        """What is held back, at the end of the sample."""
        if self._text is None:
            return Checked("")
        flushed = self._text.flush()
        if self._stops is None:
            return Checked(flushed)
        checked = self._stops.feed(flushed, armed=len(self.tokens) >= self._min_tokens)
        return checked if checked.matched else Checked(checked.text + self._stops.flush())

    def _end(self, reason: FinishReason, stop: str | None = None, stop_token_id: int | None = None) -> None:
        self.choice = Choice(self.index, reason, len(self.tokens), stop, stop_token_id)
