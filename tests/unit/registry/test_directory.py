"""What is last known stands while Redis is away, and for one ttl after it came back empty."""

import asyncio

import pytest

from kvmesh import redis_server
from kvmesh.registry import Directory, Registry, StaticDirectory
from kvmesh.types import Role, WorkerInfo


def worker(name, role=Role.DECODE):
    return WorkerInfo(name, 1, role, "127.0.0.1:1", 7)


async def change(directory):
    assert await directory.wait_for_change(10)


async def test_a_directory_follows_the_registry(registry):
    seen = []
    async with Directory(registry, poll=0.01) as directory:
        assert directory.available
        assert directory.workers() == []
        unsubscribe = directory.subscribe(seen.append)
        async with registry.register(worker("d")):
            await change(directory)
            async with registry.register(worker("p", Role.PREFILL)):
                await change(directory)
                assert directory.workers() == [worker("d"), worker("p", Role.PREFILL)]
                assert directory.workers(Role.PREFILL) == [worker("p", Role.PREFILL)]
                assert directory.workers(Role.ROUTER) == []
            unsubscribe()
        await directory.refresh()
    assert seen[:2] == [[worker("d")], [worker("d"), worker("p", Role.PREFILL)]]


async def test_who_leaves_is_dropped(redis):
    registry = Registry(redis.url, ttl=0.2)
    await registry.redis.flushall()
    async with Directory(registry, poll=0.01) as directory:
        async with registry.register(worker("d")):
            await change(directory)
        await change(directory)
        assert directory.workers() == []
    await registry.close()


async def test_the_last_known_workers_stand_while_redis_is_away_and_until_they_are_back(tmp_path):
    server = redis_server.start(folder=tmp_path)
    registry, other = Registry(server.url, ttl=60), Registry(server.url)
    seen = []
    async with registry.register(worker("d")), Directory(registry, poll=0.01) as directory:
        directory.subscribe(seen.append)
        server.process.kill()
        server.stop()
        await directory.refresh()
        assert not directory.available
        assert directory.workers() == [worker("d")]
        with redis_server.start(port=server.port, folder=tmp_path):
            await directory.refresh()
            assert directory.available
            assert directory.workers() == [worker("d")]
            async with other.register(worker("e")):
                await directory.refresh()
                assert directory.workers() == [worker("d"), worker("e")]
    assert seen[0] == [worker("d"), worker("e")]
    await registry.close()
    await other.close()


async def test_a_wipe_between_two_polls_is_noticed_and_the_dead_are_dropped_in_the_end(redis):
    registry = Registry(redis.url, ttl=0.3)
    await registry.redis.flushall()
    beating = registry.register(worker("d"))
    await beating.__aenter__()
    async with Directory(registry, poll=60) as directory:
        await registry.redis.flushall()
        await directory.refresh()
        assert directory.workers() == [worker("d")]
        await beating.__aexit__(None, None, None)
        async with asyncio.timeout(10):
            while directory.workers():
                await directory.refresh()
                await asyncio.sleep(0.01)
    await registry.close()


async def test_a_directory_opens_without_redis():
    registry = Registry("redis://127.0.0.1:1/0")
    async with Directory(registry, poll=0.01) as directory:
        assert not directory.available
        assert directory.workers() == []
        assert not await directory.wait_for_change(0.01)
    await registry.close()


async def test_a_static_directory_changes_when_told(caplog):
    directory = StaticDirectory([worker("a")])
    seen = []

    def broken(workers):
        raise ZeroDivisionError

    directory.subscribe(broken)
    directory.subscribe(seen.append)
    waiting = asyncio.create_task(directory.wait_for_change(10))
    await asyncio.sleep(0)
    directory.set([worker("a")])
    assert seen == []
    directory.set([worker("b")])
    assert await waiting
    assert seen == [[worker("b")]]
    assert "ZeroDivisionError" in caplog.text
    async with directory as entered:
        await entered.refresh()
        assert entered.workers() == [worker("b")]
        assert entered.available


@pytest.mark.parametrize("role", list(Role))
def test_roles_filter(role):
    directory = StaticDirectory([worker(each.value, each) for each in Role])
    assert directory.workers(role) == [worker(role.value, role)]
