"""Runs one iteration on torch: block copies, the forward pass over flattened tokens, and a draw per due token.

Implements `batch.Runner`. Knows no queue, no prefix cache and no policy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor

from kvmesh.engine.api import KvArray, KvLayout
from kvmesh.engine.attention.choice import torch_back_end
from kvmesh.engine.attention.flashinfer_pool import PagePool
from kvmesh.engine.attention.interface import BackEnd, Segment
from kvmesh.engine.batch import Batch, Draw, Row, SampledToken
from kvmesh.engine.cuda.staging import to_device
from kvmesh.engine.forward_choice import forward_of
from kvmesh.engine.grammar import Grammars
from kvmesh.engine.models.llama import Decoder
from kvmesh.engine.sampling import sample


class TorchRunner:
    """A whole model and `blocks` blocks of its KV on the model's device."""

    def __init__(
        self,
        model: Decoder,
        blocks: int,
        max_model_len: int | None = None,
        back_end: BackEnd | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        self._model = model
        self._grammars = grammars
        build = back_end or torch_back_end(model.device)
        self._pool, attention = build(kv_layout(model), blocks, model.windows)
        self._forward = forward_of(model, attention)
        self._max_model_len = min(max_model_len or model.config.max_model_len, model.config.max_model_len)

    @property
    def layout(self) -> KvLayout:
        return self._pool.layout

    @property
    def blocks(self) -> int:
        return self._pool.blocks

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    @property
    def vocabulary_size(self) -> int:
        return self._model.config.vocabulary_size

    @torch.inference_mode()
    def run(self, batch: Batch) -> list[list[SampledToken]]:
        self._pool.copy(batch.copies)
        logits = self._logits(batch.rows)
        draws = [draw for row in batch.rows for draw in row.draws]
        if not draws and self._model.device.type == "cuda":
            # Drawing waits for the device. Without it too a step is over when it returns: the next one writes to the
            # pinned memory that this one was planned in, and whoever measures it means the whole of it.
            torch.cuda.current_stream().synchronize()
        sampled = iter(self._sample(logits, draws) if draws else ())
        return [[next(sampled) for _ in row.draws] for row in batch.rows]

    def _sample(self, logits: Tensor, draws: Sequence[Draw]) -> list[SampledToken]:
        """Tokens that the grammars of those draws that have one allow."""
        bound = [row for row, draw in enumerate(draws) if draw.params.grammar]
        if not bound:
            return sample(logits, draws)
        allowed, problems = self._allowed([draws[row] for row in bound])
        logits[bound] = logits[bound].masked_fill(~allowed, float("-inf"))
        failures = {row: problem for row, problem in zip(bound, problems, strict=True) if problem}
        free = [row for row in range(len(draws)) if row not in failures]
        tokens = dict(zip(free, sample(logits[free], [draws[row] for row in free]), strict=True)) if free else {}
        return [tokens.get(row) or SampledToken(0, failure=failures[row]) for row in range(len(draws))]

    def _allowed(self, draws: Sequence[Draw]) -> tuple[Tensor, list[str]]:
        if self._grammars is None:
            nothing = torch.zeros(len(draws), self.vocabulary_size, dtype=torch.bool)
            return nothing, ["there is no tokenizer for a grammar"] * len(draws)
        allowed, problems = self._grammars.allowed(draws)
        return torch.from_numpy(allowed).to(self._model.device), problems

    @torch.inference_mode()
    def read_kv(self, block_ids: Sequence[int], start: int, tokens: int) -> KvArray:
        return self._pool.read(block_ids, start, tokens)

    @torch.inference_mode()
    def begin_read_kv(self, block_ids: Sequence[int], start: int, tokens: int) -> Callable[[], KvArray]:
        if isinstance(self._pool, PagePool):
            return self._pool.begin_read(block_ids, start, tokens)
        data = self._pool.read(block_ids, start, tokens)
        return lambda: data

    @torch.inference_mode()
    def write_kv(self, block_ids: Sequence[int], start: int, data: KvArray) -> None:
        self._pool.write(block_ids, start, data)

    def _logits(self, rows: Sequence[Row]) -> Tensor:
        """Logits of the last token of each row, once per draw: `[draws, vocabulary]`."""
        if not rows:
            return torch.empty(0)
        token_ids = list(chain.from_iterable(row.token_ids for row in rows))
        positions = list(chain.from_iterable(map(_positions, rows)))
        segments = [Segment(row.start, len(row.token_ids), row.block_ids) for row in rows]
        hidden = self._forward(token_ids, positions, segments)
        drawn, repeats = _drawn(rows)
        if not drawn:
            return torch.empty(0)
        if len(drawn) < len(hidden):
            hidden = hidden.index_select(0, self._tensor(drawn))
        logits = self._model.logits(hidden)
        return logits if max(repeats) == 1 else logits.repeat_interleave(self._tensor(repeats), dim=0)

    def _tensor(self, values: list[int]) -> Tensor:
        return to_device(torch.tensor(values, dtype=torch.int64), self._model.device)


def _positions(row: Row) -> range:
    return range(row.start, row.start + len(row.token_ids))


def _drawn(rows: Sequence[Row]) -> tuple[list[int], list[int]]:
    """Where in the flattened tokens the drawing rows end, and how many draws each has."""
    ends, repeats, end = [], [], 0
    for row in rows:
        end += len(row.token_ids)
        if row.draws:
            ends.append(end - 1)
            repeats.append(len(row.draws))
    return ends, repeats


def kv_layout(model: Decoder) -> KvLayout:
    """The shape of this model's KV."""
    config = model.config
    dtype = str(model.dtype).removeprefix("torch.")
    return KvLayout(model.end_layer - model.first_layer, config.kv_heads, config.head_dim, dtype, config.kv_planes)
