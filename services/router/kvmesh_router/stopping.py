"""Stop strings, wherever token boundaries fall.

The text ends before the stop string that is complete first; of those complete at the same character, the longest. Only
as much text is held back as could begin a stop string. Knows text, not tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Checked:
    """Text that is safe to show, and the stop string that ended it."""

    text: str
    matched: str | None = None


class StopChecker:
    """One sample's text on its way out."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def feed(self, text: str, armed: bool = True) -> Checked:
        """Takes more text. While not `armed`, a stop string completed in it is ordinary text."""
        before = len(self._held) if armed else len(self._held) + len(text)
        pending = self._held + text
        matched = self._first_match(pending, completed_after=before)
        if matched is not None:
            end, stop = matched
            return Checked(pending[: end - len(stop)], stop)
        kept = len(pending) - self._beginning(pending)
        self._held = pending[kept:]
        return Checked(pending[:kept])

    def flush(self) -> str:
        """What was held back, at the end of the sample."""
        held, self._held = self._held, ""
        return held

    def fork(self) -> StopChecker:
        """An independent copy at the same place."""
        copy = StopChecker(self._stops)
        copy._held = self._held
        return copy

    def _first_match(self, text: str, completed_after: int) -> tuple[int, str] | None:
        """(end, stop string) of the match that ends first, and then of the longest."""
        found = []
        for stop in self._stops:
            at = text.find(stop, max(0, completed_after - len(stop) + 1))
            if at >= 0:
                found.append((at + len(stop), -len(stop), stop))
        if not found:
            return None
        end, _, stop = min(found)
        return end, stop

    def _beginning(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = 0
        for stop in self._stops:
            at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while 0 <= at < len(text) - longest:
                if stop.startswith(text[at:]):
                    longest = len(text) - at
                at = text.find(stop[0], at + 1)
        return longest
