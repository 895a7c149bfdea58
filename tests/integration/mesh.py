"""A whole mesh in one process: the services' real composition, real gRPC and Redis sockets, fake models.

Each part binds 127.0.0.1, is known to the others by a relay at 127.0.0.2 of the same port, and knows Redis by a relay
too. So a part can be frozen (as by SIGSTOP: sockets open, silence) or killed (connections reset, no goodbye in Redis).
What a killed part does on its way out, such as releasing a lease, still happens: SIGKILL is for tests of processes.
"""

import asyncio
import random
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Self

import grpc.aio

from kvmesh import redis_server
from kvmesh.errors import KvmeshError, Unavailable
from kvmesh.rpc.channel import ChannelPool
from kvmesh.rpc.convert import statistics_from_proto
from kvmesh.rpc.stream import unary
from kvmesh.types import Role, WorkerStatistics
from kvmesh.v1.common_pb2 import GetStatisticsRequest
from kvmesh.v1.common_pb2_grpc import WorkerServiceStub
from tests.integration.proxy import Proxy

RELAY_HOST = "127.0.0.2"
PORTS = range(20_000, 32_000)
SETTLE_SECONDS = 15.0
COMMON = {"host": "127.0.0.1", "advertise": RELAY_HOST, "model": "fake", "registry_ttl": 2.0}
CONFIGS = {
    Role.KVSTORE: "KvStoreConfig",
    Role.PREFILL: "PrefillConfig",
    Role.DECODE: "DecodeConfig",
    Role.MIXED: "MixedConfig",
    Role.ROUTER: "RouterConfig",
}


@dataclass
class Part:
    """One service of the mesh. `process` is what its composition function yields; None once it is gone."""

    name: str
    role: Role
    settings: dict[str, Any]
    relay: Proxy = field(default_factory=lambda: Proxy(RELAY_HOST))
    redis_relay: Proxy = field(default_factory=Proxy)
    process: Any = None
    _task: asyncio.Task[None] | None = None
    _leave: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def address(self) -> str:
        """What the others call."""
        return f"{RELAY_HOST}:{self.relay.port}"

    @property
    def own_address(self) -> str:
        """Past the relay."""
        return f"127.0.0.1:{self.relay.port}"

    async def start(self, redis_port: int, port: int = 0) -> None:
        await self.redis_relay.open()
        self.redis_relay.target = ("127.0.0.1", redis_port)
        await self._open_relay(port)
        self.relay.target = ("127.0.0.1", self.relay.port)
        url = f"redis://127.0.0.1:{self.redis_relay.port}/0"
        config_type, start = _service(self.role)
        given = {**COMMON, **self.settings, "redis_url": url, "port": self.relay.port, "worker_id": self.name}
        config = config_type(**{name: value for name, value in given.items() if name in config_type.model_fields})
        ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._live(start(config), ready))
        await asyncio.wait([ready, self._task], return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            await self._task
        self.process = ready.result()

    async def _open_relay(self, port: int) -> None:
        """At a port that is free on both hosts, outside the range from which outgoing connections take theirs."""
        for candidate in [port] if port else random.sample(PORTS, 100):
            with suppress(OSError), socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", candidate))
                await self.relay.open(candidate)
                return
        raise Unavailable("no free port for a relay")

    async def _live(self, context: AbstractAsyncContextManager[Any], ready: asyncio.Future[Any]) -> None:
        async with context as process:
            ready.set_result(process)
            await self._leave.wait()

    async def stop(self) -> None:
        """Leaves the composition, at once. Idempotent."""
        self._leave.set()
        if self._task is not None:
            await asyncio.wait([self._task])
        self.process = None
        self.relay.cut()
        self.redis_relay.cut()


class Mesh:
    """`async with Mesh(decode=2) as mesh:` starts all parts and waits until each is ready."""

    def __init__(
        self,
        *,
        kvstore: int = 1,
        prefill: int = 1,
        decode: int = 1,
        mixed: int = 0,
        router: int = 0,
        **settings: dict[str, Any],
    ) -> None:
        """`settings`: config fields of all parts of a role, as in `decode_settings={"kv_blocks": 8}`."""
        workers = {Role.PREFILL: prefill, Role.DECODE: decode, Role.MIXED: mixed}
        counts = {Role.KVSTORE: kvstore, **workers, Role.ROUTER: router}
        self._settings = {role: settings.pop(f"{role}_settings", {}) for role in counts}
        assert not settings, settings
        self._names = [(f"{role}-{number}", role) for role, count in counts.items() for number in range(count)]
        self.parts: dict[str, Part] = {}
        self._stack = AsyncExitStack()

    def __getitem__(self, name: str) -> Part:
        return self.parts[name]

    async def __aenter__(self) -> Self:
        self.redis = redis_server.start()
        self._stack.callback(lambda: self.redis.stop())
        self.channels = ChannelPool()
        self._stack.push_async_callback(self._stop_all)
        self._stack.push_async_callback(self.channels.close)
        try:
            for name, role in self._names:
                await self.start(name, role)
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    # Parts -------------------------------------------------------------------------------------------------------

    async def start(self, name: str, role: Role, port: int = 0, **settings: Any) -> Part:
        """Adds a part; returns once it is registered and serves."""
        part = Part(name, role, {**self._settings[role], **settings})
        await part.start(self.redis.port, port)
        self.parts[name] = part
        return part

    async def kill(self, name: str) -> None:
        """Connections reset, nothing deregistered."""
        part = self.parts[name]
        part.relay.cut()
        part.redis_relay.cut()
        await part.stop()

    def freeze(self, name: str) -> None:
        """Sockets stay open, nothing comes or goes, heartbeats in Redis included."""
        self.parts[name].relay.freeze()
        self.parts[name].redis_relay.freeze()

    def thaw(self, name: str) -> None:
        self.parts[name].relay.thaw()
        self.parts[name].redis_relay.thaw()

    async def restart(self, name: str) -> Part:
        """Kills the part, if it lives, and starts it anew at the same address, with a new epoch."""
        old = self.parts[name]
        await self.kill(name)
        return await self.start(name, old.role, old.relay.port, **old.settings)

    async def kill_redis(self) -> None:
        await asyncio.to_thread(self.redis.stop)

    async def restart_redis(self) -> None:
        """A new, empty server at the old port."""
        self.redis = await asyncio.to_thread(redis_server.start, self.redis.port)

    async def _stop_all(self) -> None:
        await asyncio.gather(*(part.stop() for part in self.parts.values()))

    # What can be asked -------------------------------------------------------------------------------------------

    def channel(self, name: str) -> grpc.aio.Channel:
        """To the part, through its relay."""
        return self.channels.get(self.parts[name].address)

    async def statistics(self, name: str) -> WorkerStatistics:
        """Past the relay, with check_integrity."""
        stub = WorkerServiceStub(self.channels.get(self.parts[name].own_address))
        reply = await unary(stub.GetStatistics(GetStatisticsRequest(check_integrity=True), timeout=5))
        return statistics_from_proto(reply.statistics)

    async def until(self, name: str, condition: Callable[[WorkerStatistics], bool]) -> WorkerStatistics:
        """Waits for a reading of the part that meets `condition`."""
        reading = WorkerStatistics()

        async def met() -> bool:
            nonlocal reading
            reading = await self.statistics(name)
            return condition(reading)

        await eventually(met)
        return reading

    async def assert_clean(self) -> None:
        """Every living part comes to rest: nothing runs or waits, no block or lease is held, every pool is whole."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while rest := await self._rest():
            assert time.monotonic() < deadline, rest
            await asyncio.sleep(0.02)

    async def _rest(self) -> dict[str, Any]:
        """What is not at rest, by part."""
        rest: dict[str, Any] = {}
        for name, part in self.parts.items():
            if part.process is not None:
                try:
                    statistics = await self.statistics(name)
                    rest[name] = _held(statistics)
                except KvmeshError as error:
                    rest[name] = repr(error)
        return {name: held for name, held in rest.items() if held}


async def eventually(condition: Callable[[], Awaitable[object]]) -> None:
    """Waits until `condition()` holds, SETTLE_SECONDS at most."""
    async with asyncio.timeout(SETTLE_SECONDS):
        while not await condition():  # noqa: ASYNC110  # What is waited for is in another part.
            await asyncio.sleep(0.01)


def _held(statistics: WorkerStatistics) -> dict[str, Any]:
    names = ("running", "waiting", "blocks_used", "leases", "integrity_errors")
    return {name: value for name in names if (value := getattr(statistics, name))}


def _service(role: Role) -> tuple[Any, Callable[[Any], AbstractAsyncContextManager[Any]]]:
    """Config class and composition function of a service; looked up late: a test may need no router."""
    config = import_module(f"kvmesh_{role}.config")
    process = import_module(f"kvmesh_{role}.process")
    return getattr(config, CONFIGS[role]), getattr(process, str(role))
