"""Starts a mesh, waits until it answers, and stops it again.

Knows the order of things; what the processes are is `plan`, how they are handled is `processes`, what is left behind
for other commands is `state`.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kvmesh import redis_server
from kvmesh.cli.plan import HOST, MeshPlan
from kvmesh.cli.processes import last_lines, spawn, stop
from kvmesh.cli.state import MeshState, ProcessRecord, StateFile
from kvmesh.client import AsyncClient
from kvmesh.errors import AlreadyExists, DeadlineExceeded, KvmeshError, Unavailable
from kvmesh.loop import run
from kvmesh.registry import Registry
from kvmesh.rpc.probe import serving
from kvmesh.types import Role

REDIS = "redis"
POLL_SECONDS = 0.1
KILL_MARGIN = 5.0
"""Seconds beyond the drain grace before a process is killed."""
ABANDON_GRACE = 1.0
"""Seconds to drain for a mesh that never came up."""
Report = Callable[[int, int], None]
"""Called with (processes ready, processes in all)."""


class Launcher:
    """One mesh on this machine, from nothing to ready and back. `file` is None for a mesh nobody else shall find."""

    def __init__(
        self,
        plan: MeshPlan,
        logs: Path,
        *,
        file: StateFile | None = None,
        redis_url: str = "",
        die_with_parent: bool = False,
    ) -> None:
        self._plan = plan
        self._logs = logs
        self._file = file
        self._die_with_parent = die_with_parent
        self._children: list[subprocess.Popen[bytes]] = []
        name = file.path.stem if file else ""
        self.state = MeshState(name, plan.model, address="", redis_url=redis_url)

    def start(self, report: Report, timeout: float) -> MeshState:
        """Blocks until every process is registered and healthy; on any failure nothing is left running.

        Raises:
            AlreadyExists: the port is taken.
            Unavailable: a process ended; its last log lines are in the message.
            DeadlineExceeded: not ready within `timeout` seconds.
        """
        check_port_free(self._plan.port)
        self._logs.mkdir(parents=True, exist_ok=True)
        try:
            self._spawn_all()
            address = run(self._wait_ready(report, time.monotonic() + timeout))
            self._record(address=address)
        except BaseException:
            self.stop(ABANDON_GRACE)
            raise
        return self.state

    def stop(self, grace: float) -> None:
        """Stops what was started, in order, and forgets the state file."""
        stop_in_order(self.state.processes, grace)
        for child in self._children:
            child.wait()
        if self._file:
            self._file.delete()

    def ended(self) -> str | None:
        """What to say of the first process found to have ended; None while all run."""
        for child, record in zip(self._children, self.state.processes, strict=True):
            if child.poll() is not None:
                log = f"its log {record.log} ends:\n{last_lines(record.log)}"
                return f"{record.name} ended with status {child.returncode}; {log}"
        return None

    def _spawn_all(self) -> None:
        if not self.state.redis_url:
            port = free_port()
            self._spawn(REDIS, redis_server.command(port, self._logs), {})
            self._record(redis_url=f"redis://{HOST}:{port}/0")
        for service in self._plan.services(self.state.redis_url):
            self._spawn(service.name, service.command, service.environment)

    def _spawn(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        log = self._logs / f"{name}.log"
        child, record = spawn(name, command, environment, log, die_with_parent=self._die_with_parent)
        self._children.append(child)
        self._record(process=record)

    def _record(self, *, address: str = "", redis_url: str = "", process: ProcessRecord | None = None) -> None:
        """Written after each step: whenever this is killed, `kvmesh down` finds what there is to stop."""
        old = self.state
        processes = (*old.processes, process) if process else old.processes
        self.state = MeshState(old.name, old.model, address or old.address, redis_url or old.redis_url, processes)
        if self._file:
            self._file.save(self.state)

    async def _wait_ready(self, report: Report, deadline: float) -> str:
        registry = Registry(self.state.redis_url)
        try:
            while True:
                if problem := self.ended():
                    raise Unavailable(problem)
                if address := await self._ready_address(registry, report):
                    return address
                if time.monotonic() > deadline:
                    raise DeadlineExceeded(f"the mesh did not become ready in time; its logs are in {self._logs}")
                await asyncio.sleep(POLL_SECONDS)
        finally:
            await registry.close()

    async def _ready_address(self, registry: Registry, report: Report) -> str | None:
        """The router's address once all are registered, healthy and known to the router."""
        services = [record for record in self.state.processes if record.name != REDIS]
        try:
            registered = {info.worker_id: info for info in await registry.list()}
        except (KvmeshError, OSError):
            return None
        mine = [registered[s.name] for s in services if s.name in registered and registered[s.name].pid == s.pid]
        healthy = [info for info in mine if await serving(info.address)]
        report(len(healthy), len(services))
        if len(healthy) < len(services):
            return None
        router = next(info.address for info in healthy if info.role is Role.ROUTER)
        return router if await _router_sees(router, {s.name for s in services}) else None


async def _router_sees(address: str, names: set[str]) -> bool:
    try:
        async with AsyncClient(address) as client:
            return names <= {worker.info.worker_id for worker in await client.status() if not worker.error}
    except KvmeshError:
        return False


def stop_in_order(processes: Sequence[ProcessRecord], grace: float) -> None:
    """The reverse of the order of starting, kind by kind: the router drains while its workers still serve."""
    kinds = itertools.groupby(reversed(processes), key=lambda record: record.name.rpartition("-")[0])
    for _, kind in kinds:
        stop(list(kind), grace + KILL_MARGIN)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def check_port_free(port: int) -> None:
    """gRPC servers share a port silently (SO_REUSEPORT), so a taken one has to be noticed here."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise AlreadyExists(f"port {port} is taken; choose another one with --port") from error
