"""Decode steps replayed from CUDA graphs, one for each number of rows in BUCKETS: hundreds of launches become one.

A batch is filled up to the next bucket with rows that read and write a page of nobody's. Whatever is not a plain
decode batch is computed operation by operation. Knows no attention but that it can be captured.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from kvmesh.engine.attention.flashinfer import CAPTURED_ROWS, FlashInferAttention
from kvmesh.engine.attention.interface import Segment
from kvmesh.engine.cuda.staging import to_device
from kvmesh.engine.forward import EagerForward
from kvmesh.engine.models.llama import Decoder

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
    """Implements `Forward`; graphs are captured when they are first needed."""

    def __init__(self, model: Decoder, attention: FlashInferAttention, recorder: Recorder) -> None:
        self._model, self._attention, self._recorder = model, attention, recorder
        self._eager = EagerForward(model, attention)
        self._replays: dict[int, Callable[[], Tensor]] = {}
        self._inputs = torch.zeros(2, CAPTURED_ROWS, dtype=torch.int64, device=model.device)

    def __call__(self, token_ids: Sequence[int], positions: Sequence[int], segments: Sequence[Segment]) -> Tensor:
        rows = len(segments)
        if rows != len(token_ids) or rows > BUCKETS[-1]:
            return self._eager(token_ids, positions, segments)
        bucket = BUCKETS[bisect_left(BUCKETS, rows)]
        if not self._attention.plan_captured(segments, bucket):
            return self._eager(token_ids, positions, segments)
        filling = [0] * (bucket - rows)
        inputs = torch.tensor([[*token_ids, *filling], [*positions, *filling]], dtype=torch.int64)
        self._inputs[:, :bucket].copy_(to_device(inputs, self._model.device))
        if bucket not in self._replays:
            self._replays[bucket] = self._recorder(lambda: self._compute(bucket))
        return self._replays[bucket]()[:rows]

    def _compute(self, bucket: int) -> Tensor:
        tokens, positions = self._inputs[:, :bucket]
        return self._model.forward(self._model.embed(tokens), positions, self._attention)
