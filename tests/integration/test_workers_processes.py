"""The workers as processes: ready, serving, drained by a signal."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator

import pytest

from kvmesh import redis_server
from kvmesh.process.main import SUPERSEDED
from kvmesh.redis_server import RedisServer
from kvmesh.registry import Registry
from kvmesh.rpc.probe import serving
from tests.integration.mesh import eventually


@pytest.fixture
async def redis() -> AsyncIterator[RedisServer]:
    with await asyncio.to_thread(redis_server.start) as server:
        yield server


async def launch(service: str, **settings: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", service, env={**os.environ, **settings}, stderr=asyncio.subprocess.PIPE
    )


@pytest.mark.parametrize("service", ["kvmesh_prefill", "kvmesh_decode"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_registered_serving_and_drained(redis: RedisServer, service: str, number: signal.Signals) -> None:
    registry = Registry(redis.url)
    process = await launch(service, KVMESH_REDIS_URL=redis.url, KVMESH_MODEL="fake", KVMESH_METRICS_PORT="0")
    async with asyncio.timeout(60):
        await eventually(registry.list)
        workers = await registry.list()
        assert [f"kvmesh_{info.role}" for info in workers] == [service]
        assert workers[0].pid == process.pid
        assert await serving(workers[0].address)
        process.send_signal(number)
        _, log = await process.communicate()
    assert process.returncode == 0, log.decode()
    assert "Traceback" not in log.decode()
    assert await registry.list() == []
    await registry.close()


@pytest.mark.parametrize("service", ["kvmesh_decode", "kvmesh_kvstore", "kvmesh_router"])
async def test_who_lost_its_name_to_a_younger_process_ends(redis: RedisServer, service: str) -> None:
    registry = Registry(redis.url)
    settings = {"KVMESH_REDIS_URL": redis.url, "KVMESH_WORKER_ID": "one", "KVMESH_REGISTRY_TTL": "0.6"}
    settings |= {} if service == "kvmesh_kvstore" else {"KVMESH_MODEL": "fake"}
    old = await launch(service, **settings)
    async with asyncio.timeout(60):
        await eventually(registry.list)
        young = await launch(service, **settings)
        _, log = await old.communicate()
        assert old.returncode == SUPERSEDED, log.decode()
        assert "one was superseded" in log.decode()
        assert [info.pid for info in await registry.list()] == [young.pid]
        young.send_signal(signal.SIGTERM)
        await young.communicate()
    assert young.returncode == 0
    await registry.close()


async def test_a_taken_port_is_one_clear_sentence(redis: RedisServer) -> None:
    process = await launch(
        "kvmesh_prefill", KVMESH_REDIS_URL=redis.url, KVMESH_MODEL="fake", KVMESH_PORT=str(redis.port)
    )
    _, log = await process.communicate()
    assert process.returncode == 1
    assert "cannot serve: cannot listen on" in log.decode()
    assert "Traceback" not in log.decode()


async def test_without_redis_a_worker_serves_all_the_same(redis: RedisServer) -> None:
    await asyncio.to_thread(redis.stop)
    process = await launch("kvmesh_decode", KVMESH_REDIS_URL=redis.url, KVMESH_MODEL="fake")
    assert process.stderr is not None
    async with asyncio.timeout(60):
        while b"serves at" not in (line := await process.stderr.readline()):
            assert line, "the worker ended"
        assert await serving(line.decode().split()[-1])
        process.send_signal(signal.SIGTERM)
        await process.communicate()
    assert process.returncode == 0
