"""Registrations expire, come back, and give way to younger processes; epochs only grow."""

import asyncio
import json
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh import redis_server
from kvmesh.errors import InvalidArgument, Unavailable
from kvmesh.registry import Registry
from kvmesh.registry.client import MAX_ENTRY_BYTES, decode, encode
from kvmesh.registry.scripts import EPOCH, WORKER, WORKERS
from kvmesh.types import Role, WorkerCapacity, WorkerInfo


def worker(name="w1", epoch=1, role=Role.DECODE):
    capacity = WorkerCapacity(blocks=100, max_running=8)
    return WorkerInfo(name, epoch, role, "127.0.0.1:1", 7, "m", "f", {"dtype": "float32"}, capacity, 1.5, "0.1.0")


async def until(condition, timeout=10):
    """Polls, so that nothing hangs on how often others do."""
    async with asyncio.timeout(timeout):
        while not await condition():  # noqa: ASYNC110  # Redis tells nobody.
            await asyncio.sleep(0.01)


async def test_who_registers_is_listed_until_it_leaves(registry):
    async with registry.register(worker("b")) as registration, registry.register(worker("a", role=Role.PREFILL)):
        assert registration.registered.is_set()
        assert await registry.list() == [worker("a", role=Role.PREFILL), worker("b")]
    assert await registry.list() == []
    assert await registry.redis.keys("kvmesh:worker*") == []


async def test_an_entry_that_is_not_beaten_expires(registry):
    await registry.redis.set(WORKER + "dead", encode(worker("dead")), px=50)
    await registry.redis.sadd(WORKERS, "dead")
    assert await registry.list() == [worker("dead")]

    async def gone():
        return await registry.list() == []

    await until(gone)
    assert await registry.redis.smembers(WORKERS) == set()


async def test_heartbeats_outlive_the_ttl(redis, registry):
    quick = Registry(redis.url, ttl=0.3)
    async with quick.register(worker()):
        expiry = await registry.redis.pexpiretime(WORKER + "w1")

        async def renewed():
            return await registry.redis.pexpiretime(WORKER + "w1") > expiry + 300

        await until(renewed)
        assert await registry.list() == [worker()]
    await quick.close()


async def test_who_was_forgotten_registers_again(redis, registry):
    quick = Registry(redis.url, ttl=0.3)
    async with quick.register(worker()):
        await registry.redis.flushall()

        async def back():
            return await registry.list() == [worker()]

        await until(back)
    await quick.close()


async def test_a_younger_process_takes_the_name_over(redis, registry):
    quick = Registry(redis.url, ttl=0.3)
    async with quick.register(worker(epoch=1)) as old, registry.register(worker(epoch=2)):
        await asyncio.wait_for(old.superseded.wait(), 5)
        assert not old.registered.is_set()
        assert await registry.list() == [worker(epoch=2)]
    assert await registry.list() == []
    await quick.close()


async def test_an_old_process_leaves_the_entry_of_a_younger_one_alone(registry):
    async with registry.register(worker(epoch=2)):
        async with registry.register(worker(epoch=1)) as old:
            assert old.superseded.is_set()
        assert await registry.list() == [worker(epoch=2)]


@pytest.mark.parametrize(
    "entry",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"worker_id": 5}', b'{"worker_id": "x"}', b'{"epoch": -1}', b"[" * 9999],
)
async def test_malformed_entries_are_skipped_and_counted(registry, entry):
    await registry.redis.set(WORKER + "bad", entry)
    await registry.redis.sadd(WORKERS, "bad")
    async with registry.register(worker()):
        assert await registry.list() == [worker()]
        assert registry.malformed == 1
        async with registry.register(worker("bad")):  # And do not block a good one.
            assert await registry.list() == [worker("bad"), worker()]


def test_an_entry_is_bounded():
    assert decode(encode(worker())) == worker()
    assert decode(encode(worker()) + b" " * MAX_ENTRY_BYTES) is None


def test_fields_of_later_versions_are_ignored():
    entry = json.loads(encode(worker())) | {"colour": "green"}
    assert decode(json.dumps(entry).encode()) == worker()


@given(st.binary(max_size=200))
def test_decoding_never_raises(entry):
    assert decode(entry) is None


async def test_epochs_grow_whatever_becomes_of_redis(registry):
    epochs = [await registry.next_epoch("w1") for _ in range(3)]
    await registry.redis.flushall()
    epochs.append(await registry.next_epoch("w1"))
    await registry.redis.set(EPOCH + "w1", epochs[-1] + 1_000_000)  # Given out by a machine whose clock is ahead.
    epochs.append(await registry.next_epoch("w1"))
    assert all(earlier < later for earlier, later in pairwise(epochs))
    assert abs(epochs[0] / 1000 - time.time()) < 60
    assert epochs[-1] == epochs[-2] + 1_000_001


async def test_epochs_grow_without_redis():
    registry = Registry("redis://127.0.0.1:1/0")
    epochs = [await registry.next_epoch("w1") for _ in range(3)]
    assert epochs == sorted(set(epochs))
    await registry.close()


async def test_a_reader_is_told_that_redis_is_away():
    registry = Registry("redis://127.0.0.1:1/0")
    with pytest.raises(Unavailable, match="registry cannot be reached"):
        await registry.list()
    await registry.close()


@pytest.mark.parametrize("url", ["", "localhost:6379", "http://localhost", "redis://localhost:notaport"])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(InvalidArgument, match="not the URL of a Redis server"):
        Registry(url)


async def test_a_worker_starts_without_redis_and_registers_when_it_comes(tmp_path):
    with redis_server.start(folder=tmp_path) as server:
        pass
    registry = Registry(server.url, ttl=0.5)
    async with registry.register(worker()) as registration:
        assert not registration.registered.is_set()
        with redis_server.start(port=server.port, folder=tmp_path):
            await asyncio.wait_for(registration.registered.wait(), 10)
            assert await registry.list() == [worker()]
    await registry.close()


async def test_a_worker_registers_again_after_redis_was_killed_and_came_back_empty(tmp_path):
    server = redis_server.start(folder=tmp_path)
    registry = Registry(server.url, ttl=0.5)
    async with registry.register(worker()) as registration:
        server.process.kill()
        server.stop()

        async def noticed():
            return not registration.registered.is_set()

        await until(noticed)
        with redis_server.start(port=server.port, folder=tmp_path):
            await asyncio.wait_for(registration.registered.wait(), 10)
            assert await registry.list() == [worker()]
    await registry.close()
