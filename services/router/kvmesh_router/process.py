"""A router process: everything built, served, registered; and taken down in the opposite order.

Reads no environment and handles no signal: `__main__` does. Tests enter `router()` in their own event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass
from math import inf

from kvmesh.kv.index import ChunkIndex
from kvmesh.process import Base, base, never
from kvmesh.registry import Directory
from kvmesh.registry.directory import StaticDirectory
from kvmesh.rpc.options import TOKEN_OPTIONS
from kvmesh.rpc.server import Server, Service
from kvmesh.scheduling.admission import Admission
from kvmesh.scheduling.policies import GATES, make_policy
from kvmesh.scheduling.policy import Slo
from kvmesh.scheduling.power import PowerPolicy
from kvmesh.types import Role, WorkerInfo
from kvmesh.v1.router_pb2_grpc import add_InferenceServiceServicer_to_server, add_MeshServiceServicer_to_server
from kvmesh_router.config import RouterConfig
from kvmesh_router.flow import Flow, Limits, Stored, nothing_stored
from kvmesh_router.gate import Gate
from kvmesh_router.model import Models
from kvmesh_router.peers import Peers
from kvmesh_router.plan_file import PlanFile
from kvmesh_router.power import Capping, PowerGuard, readings
from kvmesh_router.servicer import InferenceServicer, MeshServicer
from kvmesh_router.status import MeshStatus


@dataclass(slots=True)
class RouterProcess:
    info: WorkerInfo
    superseded: asyncio.Event
    flow: Flow
    status: MeshStatus
    server: Server
    presence: AsyncExitStack
    """Its entry in the registry."""

    async def failed(self) -> None:
        await never()

    async def drain(self, grace: float) -> None:
        """Leaves the registry and takes no new requests; running ones have `grace` seconds, then are cleaned up."""
        self.status.draining = True
        await self.presence.aclose()
        await self.server.drain(grace)
        await self.flow.janitor.close()


@asynccontextmanager
async def router(config: RouterConfig) -> AsyncIterator[RouterProcess]:
    """A router that is registered and serves until the block is left.

    Raises:
        KvmeshError: it cannot start.
    """
    ground_of_router = base(config, Role.ROUTER, channel_options=TOKEN_OPTIONS)
    async with ground_of_router as ground, Directory(ground.registry) as directory:
        stored = ChunkIndex(ground.registry.redis).match
        async with serve_router(config, ground, directory, stored) as process:
            await process.presence.enter_async_context(ground.registered())
            yield process


@asynccontextmanager
async def serve_router(
    config: RouterConfig, ground: Base, directory: StaticDirectory, stored: Stored = nothing_stored
) -> AsyncIterator[RouterProcess]:
    """A router over any directory, not registered itself."""
    flow = build_flow(config, ground, directory, stored)
    if config.model:
        await flow.models.preload(config.model)
    flow.models.prepare(directory.workers())
    status = MeshStatus(flow, lambda: ground.info)
    async with (
        _planned(config, flow),
        _powered(config, flow, ground),
        ground.serving(_services(config, flow, status), status.statistics) as server,
        AsyncExitStack() as presence,
    ):
        yield RouterProcess(ground.info, ground.superseded, flow, status, server, presence)
    await flow.janitor.close()


def _planned(config: RouterConfig, flow: Flow) -> AbstractAsyncContextManager[None]:
    if config.plan is None:
        return nullcontext()
    return PlanFile(config.plan, flow.policy, flow.directory.workers).followed()


def _powered(config: RouterConfig, flow: Flow, ground: Base) -> AbstractAsyncContextManager[None]:
    if config.power_budget is None:
        return nullcontext()
    policy, metrics = PowerPolicy(config.power_budget), ground.telemetry.metrics
    return PowerGuard(policy, flow.gate, readings(flow), metrics, Capping(flow)).watching()


def build_flow(config: RouterConfig, ground: Base, directory: StaticDirectory, stored: Stored) -> Flow:
    limits = Limits(
        stall=config.stall_timeout,
        patience=config.worker_patience,
        lease_ttl=config.lease_ttl,
        replicas=config.replicas,
        min_prefill_tokens=config.min_prefill_tokens,
        slo=Slo(config.ttft_slo or inf, config.tpot_slo or inf),
    )
    flow = Flow(
        directory=directory,
        models=Models(directory, patience=config.worker_patience),
        gate=Gate(Admission(config.max_concurrent, config.max_queued)),
        peers=Peers(ground.channels),
        metrics=ground.telemetry.metrics,
        policy=make_policy(config.policy, gate=GATES[config.gate]()),
        limits=limits,
        stored=stored,
    )
    directory.subscribe(flow.policy.retain)
    directory.subscribe(flow.peers.retain)
    directory.subscribe(flow.models.prepare)
    return flow


def _services(config: RouterConfig, flow: Flow, status: MeshStatus) -> list[Service]:
    inference = InferenceServicer(
        flow, status, default_deadline=config.default_deadline, client_stall=config.client_stall_timeout
    )
    return [
        Service("kvmesh.v1.InferenceService", lambda server: add_InferenceServiceServicer_to_server(inference, server)),
        Service(
            "kvmesh.v1.MeshService", lambda server: add_MeshServiceServicer_to_server(MeshServicer(status), server)
        ),
    ]
