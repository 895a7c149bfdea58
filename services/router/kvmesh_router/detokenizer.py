"""Incremental detokenisation: text as soon as it is certain, and never half a character.

The deltas of a sample, joined, equal decoding all its tokens at once. A window of recent tokens is decoded again with
each batch, because a token's text depends on its left neighbours (leading spaces, bytes of one character). Our own
rather than `tokenizers.decoders.DecodeStream`, which decodes twice per step, holds a whole batch back for half a
character at its end, raises on some invalid bytes and cannot be flushed. Knows no stop strings and no requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]
"""Token ids to text, at once."""

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What `decode` makes of bytes that are no character, or not yet one."""
WINDOW = 24
"""Tokens after which the window moves on, if it can."""
GARBAGE = 256
"""Bytes that were no character for this many tokens never become one: they are let go as they are."""


class Detokenizer:
    """One sample's text. Not reusable."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._given = 0
        self._clean = 0

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that became certain with these tokens."""
        self._window.extend(token_ids)
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT) and len(self._window) - self._clean <= GARBAGE:
            return self._give(text.rstrip(REPLACEMENT))
        delta = self._give(text)
        self._move_on()
        return delta

    def flush(self) -> str:
        """What was held back; half a character comes as U+FFFD. Call once, at the end."""
        return self._give(self._decode(self._window)) if len(self._window) > self._clean else ""

    def fork(self) -> Detokenizer:
        """An independent copy at the same place."""
        copy = Detokenizer(self._decode)
        copy._window, copy._given, copy._clean = self._window.copy(), self._given, self._clean
        return copy

    def _give(self, text: str) -> str:
        delta = text[self._given :]
        self._given = max(self._given, len(text))
        return delta

    def _move_on(self) -> None:
        """All is given: keep what came since the last such moment as left context, if it shows text of its own."""
        if len(self._window) > WINDOW:
            context = self._window[self._clean :]
            text = self._decode(context)
            if text and (len(self._window) > GARBAGE or not text.endswith(REPLACEMENT)):
                self._window, self._given = context, len(text)
        self._clean = len(self._window)
