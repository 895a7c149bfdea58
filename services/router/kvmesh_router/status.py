"""What the mesh consists of at this moment, for clients and operators."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from kvmesh.rpc.convert import statistics_to_proto, worker_info_to_proto
from kvmesh.types import WorkerInfo, WorkerStatistics
from kvmesh.v1 import common_pb2, router_pb2
from kvmesh_router.flow import Flow
from kvmesh_router.model import context_of

STATISTICS_SECONDS = 1.0


@dataclass(slots=True)
class MeshStatus:
    """`own` describes this router."""

    flow: Flow
    own: Callable[[], WorkerInfo]
    draining: bool = False

    async def workers(self, check_integrity: bool) -> list[router_pb2.WorkerStatus]:
        """Every process known, asked at once; the router itself first."""
        own = self.own()
        others = [info for info in self.flow.directory.workers() if info.worker_id != own.worker_id]
        mine = router_pb2.WorkerStatus(
            info=worker_info_to_proto(own), statistics=statistics_to_proto(self.statistics(check_integrity))
        )
        return [mine, *await asyncio.gather(*(self._ask(info, check_integrity) for info in others))]

    async def models(self, name: str | None) -> list[router_pb2.ModelInfo]:
        """One model, or all.

        Raises:
            NotFound: no such model.
        """
        names = [name] if name else self.flow.models.served()
        return [await self._model(name) for name in names]

    def statistics(self, check_integrity: bool = False) -> WorkerStatistics:
        """The router's own reading."""
        flow = self.flow
        return WorkerStatistics(
            running=flow.gate.admission.running,
            waiting=flow.gate.admission.waiting,
            requests_total=flow.counts.requests,
            tokens_total=flow.counts.tokens,
            uptime_seconds=time.time() - self.own().started_at,
            draining=self.draining,
            integrity_errors=flow.check_integrity() if check_integrity else [],
        )

    async def _ask(self, info: WorkerInfo, check_integrity: bool) -> router_pb2.WorkerStatus:
        reading = await self.flow.peers.statistics(info, check_integrity, STATISTICS_SECONDS)
        status = router_pb2.WorkerStatus(info=worker_info_to_proto(info))
        if isinstance(reading, common_pb2.WorkerStatistics):
            status.statistics.CopyFrom(reading)
        else:
            status.error = reading
        return status

    async def _model(self, name: str) -> router_pb2.ModelInfo:
        model = await self.flow.models.get(name)
        workers = [info for info in self.flow.directory.workers() if info.model == name]
        return router_pb2.ModelInfo(
            name=name,
            max_model_len=context_of(model, workers),
            vocabulary_size=model.vocabulary_size,
            eos_token_ids=sorted(model.eos_token_ids),
            has_chat_template=model.tokenizer.has_chat_template,
            fingerprint=next((info.fingerprint for info in workers), ""),
            prefill_workers=sum(info.role.prefills for info in workers),
            decode_workers=sum(info.role.decodes for info in workers),
        )
