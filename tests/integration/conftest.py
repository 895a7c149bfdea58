"""Meshes for tests: each is checked to be clean at the end."""

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack

import pytest

from kvmesh import redis_server
from tests.integration.calls import Calls
from tests.integration.mesh import Mesh
from tests.integration.stores import Stores


@pytest.fixture
async def mesh() -> AsyncIterator[Mesh]:
    """One kvstore, one prefill, one decode."""
    async with Mesh() as mesh:
        yield mesh
        await mesh.assert_clean()


@pytest.fixture
def calls(mesh: Mesh) -> Calls:
    return Calls(mesh)


@pytest.fixture(scope="module")
def redis() -> Iterator[redis_server.RedisServer]:
    with redis_server.start() as server:
        yield server


@pytest.fixture
async def kvstores(redis: redis_server.RedisServer) -> AsyncIterator[Stores]:
    """No store yet; whichever the test starts."""
    async with AsyncExitStack() as stack:
        stores = Stores(redis, stack)
        await stores.registry.redis.flushall()
        stack.push_async_callback(stores.registry.close)
        stack.push_async_callback(stores.channels.close)
        yield stores
