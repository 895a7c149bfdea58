"""A router that plays a script over real gRPC: what it sends, and what it was sent."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from kvmesh.errors import KvmeshError
from kvmesh.rpc.server import Service, serve
from kvmesh.v1 import common_pb2, router_pb2, router_pb2_grpc

Script = Sequence[router_pb2.GenerateStreamResponse | KvmeshError | None]
"""None: wait until the call is cancelled."""


@dataclass
class ScriptedRouter(router_pb2_grpc.InferenceServiceServicer, router_pb2_grpc.MeshServiceServicer):
    """Replays `script` for each stream; `cancelled` is set when a caller left one."""

    script: Script = ()
    models: Sequence[router_pb2.ModelInfo] = ()
    workers: Sequence[router_pb2.WorkerStatus] = ()
    requests: list[Any] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    async def GenerateStream(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.requests.append(request)
        for step in self.script:
            if isinstance(step, KvmeshError):
                raise step
            if step is None:
                await self._until_cancelled()
            else:
                yield step

    async def _until_cancelled(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()

    async def Generate(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        events = [step for step in self.script if isinstance(step, router_pb2.GenerateStreamResponse)]
        text = "".join(event.delta.text for event in events)
        return router_pb2.GenerateResponse(
            prompt=events[0].prompt,
            completions=[router_pb2.Completion(index=0, text=text, token_ids=[1, 2])],
            finish=events[-1].finish,
        )

    async def Abort(self, request: Any, context: Any) -> Any:
        self.aborted.append(request.request_id)
        return router_pb2.AbortResponse(aborted=True)

    async def GetModelInfo(self, request: Any, context: Any) -> Any:
        return router_pb2.GetModelInfoResponse(models=self.models)

    async def GetMeshStatus(self, request: Any, context: Any) -> Any:
        return router_pb2.GetMeshStatusResponse(workers=self.workers)


@asynccontextmanager
async def serving_router(router: ScriptedRouter) -> AsyncIterator[str]:
    """Serves it on a free port; yields the address."""
    services = [
        Service("kvmesh.v1.InferenceService", partial(router_pb2_grpc.add_InferenceServiceServicer_to_server, router)),
        Service("kvmesh.v1.MeshService", partial(router_pb2_grpc.add_MeshServiceServicer_to_server, router)),
    ]
    async with serve(host="127.0.0.1", port=0, services=services) as server:
        yield server.address


@contextmanager
def threaded_router(router: ScriptedRouter) -> Iterator[tuple[str, asyncio.AbstractEventLoop]]:
    """The same on a loop of its own, for callers without one; yields (address, loop)."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    context = serving_router(router)
    try:
        yield asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result(10), loop
        asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), loop).result(10)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def prompt_message(tokens: int = 3) -> router_pb2.GenerateStreamResponse:
    info = router_pb2.PromptInfo(request_id="r", model="m", prompt_tokens=tokens, seed=7)
    return router_pb2.GenerateStreamResponse(prompt=info)


def delta_message(text: str, offset: int) -> router_pb2.GenerateStreamResponse:
    delta = router_pb2.Delta(index=0, token_offset=offset, text=text, token_ids=[offset])
    return router_pb2.GenerateStreamResponse(delta=delta)


def finish_message() -> router_pb2.GenerateStreamResponse:
    choice = router_pb2.ChoiceFinish(index=0, reason=common_pb2.FINISH_REASON_STOP, stop="\n", completion_tokens=2)
    finish = router_pb2.FinishInfo(
        choices=[choice],
        usage=common_pb2.Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1),
        timings=common_pb2.Timings(first_token_seconds=0.25, total_seconds=1.5),
        recoveries=1,
        decode_worker="decode-0",
    )
    return router_pb2.GenerateStreamResponse(finish=finish)
