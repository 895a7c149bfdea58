"""A real Redis-protocol server of its own for each test that stops it, shared by the others."""

from collections.abc import AsyncIterator, Iterator

import pytest

from kvmesh import redis_server
from kvmesh.redis_server import RedisServer
from kvmesh.registry import Registry


@pytest.fixture(scope="session")
def redis() -> Iterator[RedisServer]:
    with redis_server.start() as server:
        yield server


@pytest.fixture
async def registry(redis: RedisServer) -> AsyncIterator[Registry]:
    registry = Registry(redis.url)
    await registry.redis.flushall()
    yield registry
    await registry.close()
