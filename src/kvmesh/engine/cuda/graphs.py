"""Decode steps replayed from CUDA graphs, one for each number of rows in BUCKETS: hundreds of launches become one.

A batch is filled up to the next bucket with rows that read and write a page of nobody's. Whatever is not a plain
decode batch is computed operation by operation, and so is everything once a capture has failed. Knows no attention but
that it can be captured.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from kvmesh.engine.attention.flashinfer import FlashInferAttention
from kvmesh.engine.attention.flashinfer_wrappers import CAPTURED_ROWS
from kvmesh.engine.attention.interface import Segment
from kvmesh.engine.cuda.staging import to_device
from kvmesh.engine.forward import EagerForward
from kvmesh.engine.models.llama import Decoder

log = logging.getLogger(__name__)

TOLERANCE = 2e-2
"""Of a replayed step, relative to the same step computed operation by operation."""
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, CAPTURED_ROWS)


class Recorder(Protocol):
    """Records what is computed from fixed memory, to compute it again."""

    def __call__(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """What is returned computes from what is then in that memory; its result is valid until the next call."""


class CudaRecorder:
    """Implements `Recorder` with CUDA graphs that share their memory."""

    def __init__(self) -> None:
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        # Once outside, for what is loaded or allocated only once; KV is then written twice, and is the same.
        compute()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process may use CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            result = compute()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


class GraphedForward:
    """Implements `Forward`; graphs are captured when they are first needed. `captures`: false once one has failed."""

    def __init__(self, model: Decoder, attention: FlashInferAttention, recorder: Recorder) -> None:
        self._model, self._attention, self._recorder = model, attention, recorder
        self._eager = EagerForward(model, attention)
        self.captures = True
        self._replays: dict[int, Callable[[], Tensor]] = {}
        self._inputs = torch.zeros(2, CAPTURED_ROWS, dtype=torch.int64, device=model.device)

    def __call__(self, token_ids: Sequence[int], positions: Sequence[int], segments: Sequence[Segment]) -> Tensor:
        if self.captures and len(segments) == len(token_ids) <= BUCKETS[-1]:
            try:
                states = self._replayed(token_ids, positions, segments)
            except IndexError:
                raise  # The batch is to blame, whoever computes it.
            except Exception as problem:
                log.warning("decode steps are not replayed from graphs: %s", problem)
                self.captures, states = False, None
            if states is not None:
                return states
        return self._eager(token_ids, positions, segments)

    @torch.inference_mode()
    def agrees(self) -> bool:
        """Whether a step of one row can be replayed, and is then what it is without. Writes to block 0."""
        step = ((0,), (0,), (Segment(0, 1, (0,)),))
        replayed, computed = self(*step).float().clone(), self._eager(*step).float()
        return self.captures and bool((replayed - computed).norm() <= TOLERANCE * computed.norm())

    def _replayed(
        self, token_ids: Sequence[int], positions: Sequence[int], segments: Sequence[Segment]
    ) -> Tensor | None:
        """None if there should be no graph for such a batch."""
        rows = len(segments)
        bucket = BUCKETS[bisect_left(BUCKETS, rows)]
        if not self._attention.plan_captured(segments, bucket):
            return None
        filling = [0] * (bucket - rows)
        inputs = torch.tensor([[*token_ids, *filling], [*positions, *filling]], dtype=torch.int64)
        self._inputs[:, :bucket].copy_(to_device(inputs, self._model.device))
        if bucket not in self._replays:
            self._replays[bucket] = self._recorder(lambda: self._compute(bucket))
        return self._replays[bucket]()[:rows]

    def _compute(self, bucket: int) -> Tensor:
        tokens, positions = self._inputs[:, :bucket]
        return self._model.forward(self._model.embed(tokens), positions, self._attention)
