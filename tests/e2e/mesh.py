"""A mesh of real processes on loopback that a test can hurt, and hold to its promises afterwards.

Everything is observed from outside: process ids, signals, and the gRPC calls any operator has.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from kvmesh import redis_server
from kvmesh.cli.plan import MeshPlan, ServicePlan
from kvmesh.cli.processes import last_lines, spawn
from kvmesh.client import AsyncClient, WorkerStatus
from kvmesh.errors import KvmeshError
from kvmesh.registry import Registry
from kvmesh.rpc.channel import ChannelPool
from kvmesh.rpc.convert import statistics_from_proto
from kvmesh.rpc.stream import unary
from kvmesh.types import Role, WorkerInfo, WorkerStatistics
from kvmesh.v1 import common_pb2, common_pb2_grpc

READY_SECONDS = 60.0
CLEAN_SECONDS = 20.0


class ProcessMesh:
    """`workers` are those registered when the mesh became ready, by worker id; restarts update them."""

    def __init__(self, plan: MeshPlan, folder: Path) -> None:
        self._plan = plan
        self._folder = folder
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._channels = ChannelPool()
        self.workers: dict[str, WorkerInfo] = {}

    @classmethod
    @asynccontextmanager
    async def running(cls, plan: MeshPlan, folder: Path) -> AsyncIterator[ProcessMesh]:
        mesh = cls(plan, folder)
        mesh.redis = await asyncio.to_thread(redis_server.start)
        try:
            mesh.registry = Registry(mesh.redis.url)
            for service in mesh.services:
                mesh._spawn(service)
            await mesh.ready()
            mesh.client = AsyncClient(mesh.router.address)
            yield mesh
            await mesh.client.close()
        finally:
            await mesh._channels.close()
            mesh._stop()

    @property
    def services(self) -> list[ServicePlan]:
        return self._plan.services(self.redis.url)

    @property
    def router(self) -> WorkerInfo:
        return next(info for info in self.workers.values() if info.role is Role.ROUTER)

    def of(self, role: Role) -> list[WorkerInfo]:
        return [info for info in self.workers.values() if info.role is role]

    # Hurting -----------------------------------------------------------------------------------------------------

    def send(self, worker_id: str, number: signal.Signals) -> None:
        self._children[worker_id].send_signal(number)
        if number is signal.SIGKILL:
            self._children[worker_id].wait()

    def exit_status(self, worker_id: str) -> int | None:
        """None while it runs; of a signal, its negative number."""
        return self._children[worker_id].poll()

    async def heal(self) -> None:
        """Mends every process that was left stopped or dead."""
        for worker_id, child in self._children.items():
            if child.poll() is None:
                self.send(worker_id, signal.SIGCONT)
            else:
                self._spawn(next(service for service in self.services if service.name == worker_id))
        await self.ready()

    async def restart_redis(self, between: Callable[[], Awaitable[None]]) -> None:
        """Kills Redis, awaits `between`, and starts an empty one on the same port."""
        self.redis.process.kill()
        self.redis.process.wait()
        await between()
        self.redis = await asyncio.to_thread(redis_server.start, self.redis.port)

    # Observing ---------------------------------------------------------------------------------------------------

    async def ready(self) -> None:
        """Every process is registered with its present pid, and the router reaches it."""

        async def whole() -> bool:
            self._check_alive()
            try:
                infos = {info.worker_id: info for info in await self.registry.list()}
            except KvmeshError:
                return False
            if {i: info.pid for i, info in infos.items()} != {i: child.pid for i, child in self._children.items()}:
                return False
            self.workers = infos
            return await self._router_sees_all()

        await until(whole, READY_SECONDS, lambda: f"not ready; known: {self.workers}")

    async def statistics(self, info: WorkerInfo, check: bool = False) -> WorkerStatistics:
        stub = common_pb2_grpc.WorkerServiceStub(self._channels.get(info.address))
        request = common_pb2.GetStatisticsRequest(check_integrity=check)
        return statistics_from_proto((await unary(stub.GetStatistics(request, timeout=5))).statistics)

    async def find(self, role: Role, condition: Callable[[WorkerStatistics], bool]) -> WorkerInfo | None:
        for info in self.of(role):
            if condition(await self.statistics(info)):
                return info
        return None

    async def assert_clean(self) -> None:
        """Nothing runs, no block is held, no lease lives, and every pool's integrity check finds nothing."""
        seen: list[WorkerStatus] = []

        async def clean() -> bool:
            seen[:] = await self.client.status(check=True)
            return len(seen) == len(self.workers) and all(map(_idle, seen))

        def explain() -> str:
            return "\n".join(f"{worker.info.worker_id}: {worker.statistics} {worker.error}" for worker in seen)

        await until(clean, CLEAN_SECONDS, explain)

    async def _router_sees_all(self) -> bool:
        try:
            async with AsyncClient(self.router.address) as client:
                seen = {(w.info.worker_id, w.info.pid) for w in await client.status() if not w.error}
        except (KvmeshError, StopIteration):
            return False
        return seen == {(info.worker_id, info.pid) for info in self.workers.values()}

    def _spawn(self, service: ServicePlan) -> None:
        log = self._folder / f"{service.name}.log"
        child, _ = spawn(service.name, service.command, service.environment, log, die_with_parent=True)
        self._children[service.name] = child

    def _check_alive(self) -> None:
        for name, child in self._children.items():
            if child.poll() is not None:
                log = last_lines(str(self._folder / f"{name}.log"), 40)
                raise AssertionError(f"{name} ended with status {child.returncode}:\n{log}")

    def _stop(self) -> None:
        for child in self._children.values():
            child.kill()
        for child in self._children.values():
            child.wait()
        self.redis.stop()


def _idle(worker: WorkerStatus) -> bool:
    statistics = worker.statistics
    return (
        statistics is not None
        and (statistics.running, statistics.waiting, statistics.blocks_used, statistics.leases) == (0, 0, 0, 0)
        and not statistics.integrity_errors
    )


async def until(
    condition: Callable[[], Awaitable[bool]], seconds: float, explain: Callable[[], str] = lambda: "it never came"
) -> None:
    """Polls until the condition holds; a failure says how things stood."""
    deadline = time.monotonic() + seconds
    while not await condition():
        if time.monotonic() > deadline:
            raise AssertionError(explain())
        await asyncio.sleep(0.01)
