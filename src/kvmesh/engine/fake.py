"""A model without weights, whose next token depends on every KV entry of its context.

The KV of a token is a hash of the token, its position and the KV before it, read back from the paged pool; the next
token is a hash of the sum over the whole context. So a wrong block table, a lost copy-on-write or a damaged chunk
shows in the tokens, and scheduler, pool, transfer and services are tested without torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kvmesh.engine.api import KvArray, KvLayout
from kvmesh.engine.batch import Batch, Draw, Row, SampledToken
from kvmesh.engine.core import EngineCore
from kvmesh.types import BLOCK_TOKENS, PositionLogprobs, TokenLogprob

FAKE_MODEL = "fake"
FAKE_VOCABULARY = 512
FAKE_EOS = 257
_PRINTABLE = tuple(range(32, 127))
_MASK = (1 << 64) - 1


def fake_layout(layout: KvLayout) -> dict[str, str]:
    """What the fingerprint of a fake model is made of."""
    return {
        "model": FAKE_MODEL,
        "dtype": layout.dtype,
        "layers": str(layout.layers),
        "kv_heads": str(layout.kv_heads),
        "head_dim": str(layout.head_dim),
        "block_tokens": str(BLOCK_TOKENS),
        "codec_family": "exact",
    }


def _mix(*values: int) -> int:
    """A 64-bit hash of integers (splitmix64's finaliser over a running sum)."""
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


class FakeRunner:
    """Implements `engine.batch.Runner`.

    `step_seconds` is slept in each iteration, `token_seconds` for each token computed in it; `eos_period`: on average
    one token in so many ends a sample (0: none does). `alphabet`: the token ids to choose from.
    """

    def __init__(
        self,
        *,
        blocks: int = 1024,
        max_model_len: int = 4096,
        step_seconds: float = 0.0,
        token_seconds: float = 0.0,
        eos_period: int = 0,
        alphabet: Sequence[int] = _PRINTABLE,
    ) -> None:
        self.layout = KvLayout(layers=2, kv_heads=1, head_dim=4, dtype="float32")
        self.blocks = blocks
        self.max_model_len = max_model_len
        self.vocabulary_size = FAKE_VOCABULARY
        self._step_seconds = step_seconds
        self._token_seconds = token_seconds
        self._eos_period = eos_period
        self._alphabet = alphabet
        self._kv: np.ndarray[Any, np.dtype[np.float32]] = np.zeros((blocks, BLOCK_TOKENS, 2, 2, 1, 4), np.float32)

    def run(self, batch: Batch) -> list[list[SampledToken]]:
        delay = self._step_seconds + self._token_seconds * sum(len(row.token_ids) for row in batch.rows)
        if delay:
            time.sleep(delay)
        for source, destination in batch.copies:
            self._kv[destination] = self._kv[source]
        return [self._run_row(row) for row in batch.rows]

    def _run_row(self, row: Row) -> list[SampledToken]:
        position = row.start
        state = int(self._slot(row, position - 1)[0, 0, 0, 0]) if position else 0
        for token in row.token_ids:
            state = _mix(state, token, position) & 0xFFFFF
            self._slot(row, position)[...] = state
            position += 1
        if not row.draws:
            return []
        context = self._kv[np.asarray(row.block_ids)].reshape(-1, 16)[:position]
        checksum = int(context.sum(dtype=np.float64))
        return [self._draw(draw, checksum) for draw in row.draws]

    def _slot(self, row: Row, position: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        slot: np.ndarray[Any, np.dtype[np.float32]] = self._kv[
            row.block_ids[position // BLOCK_TOKENS], position % BLOCK_TOKENS
        ]
        return slot

    def _draw(self, draw: Draw, checksum: int) -> SampledToken:
        params = draw.params
        randomness = (params.seed, draw.index, draw.offset) if params.temperature else ()
        value = _mix(checksum, *randomness)
        token = self._alphabet[value % len(self._alphabet)]
        if self._eos_period and value // 1000 % self._eos_period == 0:
            token = FAKE_EOS
        if draw.offset < params.min_tokens and token in params.ending_token_ids:
            token = next(other for other in self._alphabet if other not in params.ending_token_ids)
        return SampledToken(token, None if params.logprobs is None else _logprobs(token, params.logprobs))

    def read_kv(self, block_ids: Sequence[int], start: int, tokens: int) -> KvArray:
        flat = self._kv[np.asarray(block_ids)].reshape(-1, 2, 2, 1, 4)[start : start + tokens]
        return np.ascontiguousarray(flat.transpose(1, 2, 0, 3, 4))

    def begin_read_kv(self, block_ids: Sequence[int], start: int, tokens: int) -> Callable[[], KvArray]:
        data = self.read_kv(block_ids, start, tokens)
        return lambda: data

    def write_kv(self, block_ids: Sequence[int], start: int, data: KvArray) -> None:
        positions = np.arange(start, start + data.shape[2])
        blocks = np.asarray(block_ids)[positions // BLOCK_TOKENS]
        self._kv[blocks, positions % BLOCK_TOKENS] = data.transpose(2, 0, 1, 3, 4)


def _logprobs(token: int, alternatives: int) -> PositionLogprobs:
    top = tuple(TokenLogprob((token + rank) % FAKE_VOCABULARY, -1.0 - rank) for rank in range(alternatives))
    return PositionLogprobs(TokenLogprob(token, -1.0), top)


def fake_engine(*, max_running: int = 64, max_waiting: int = 256, token_budget: int = 512, **runner: Any) -> EngineCore:
    """An engine on a FakeRunner; `runner` are its parameters."""
    return EngineCore(FakeRunner(**runner), max_running=max_running, max_waiting=max_waiting, token_budget=token_budget)
