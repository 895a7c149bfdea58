"""Caps of a worker's clocks: leased, renewed, refused, and gone when the worker ends."""

import asyncio

import pytest

from kvmesh.errors import InvalidArgument, Mismatch, Unavailable
from kvmesh.v1.common_pb2 import CapClockRequest
from kvmesh.worker.clock import ClockCap
from kvmesh.worker.config import WorkerConfig


class FakeClocks:
    def __init__(self, allowed=True):
        self.allowed, self.history = allowed, []

    def cap(self, share):
        if not self.allowed:
            raise Unavailable("clocks may be set by root alone")
        self.history.append(share)


async def until(clocks, history):
    async with asyncio.timeout(10):
        while clocks.history != history:  # noqa: ASYNC110  # The clocks are set by a thread.
            await asyncio.sleep(0.005)


async def test_a_cap_ends_by_itself():
    clocks = FakeClocks()
    await ClockCap(clocks).cap(0.8, 0.02)
    assert clocks.history == [0.8]
    await until(clocks, [0.8, 1.0])


async def test_a_renewed_cap_goes_on_and_is_set_once():
    clocks = FakeClocks()
    cap = ClockCap(clocks)
    await cap.cap(0.8, 0.02)
    await cap.cap(0.8, 60)
    await asyncio.sleep(0.05)
    assert clocks.history == [0.8]
    await cap.cap(0.2, 60)
    await cap.cap(1.0, 60)
    assert clocks.history == [0.8, 0.2, 1.0]
    await cap.close()
    assert clocks.history == [0.8, 0.2, 1.0]


async def test_a_worker_that_ends_frees_its_accelerators():
    clocks = FakeClocks()
    cap = ClockCap(clocks)
    await cap.cap(0.5, 60)
    await cap.close()
    assert clocks.history == [0.5, 1.0]


async def test_who_may_not_says_so():
    with pytest.raises(Mismatch, match="KVMESH_POWER_CLOCKS=nvml"):
        await ClockCap().cap(0.5, 1)
    with pytest.raises(Unavailable, match="root alone"):
        await ClockCap(FakeClocks(allowed=False)).cap(0.5, 1)


@pytest.mark.parametrize(
    ("clock", "seconds", "field"),
    [
        (0, 1, "clock"),
        (1.1, 1, "clock"),
        (float("nan"), 1, "clock"),
        (0.5, 0, "lease_seconds"),
        (0.5, 1e9, "lease_sec"),
    ],
)
async def test_bad_requests(clock, seconds, field):
    with pytest.raises(InvalidArgument, match=field):
        await ClockCap(FakeClocks()).CapClock(CapClockRequest(clock=clock, lease_seconds=seconds), None)


async def test_without_the_setting_there_is_nothing_to_set():
    async with ClockCap.opened(WorkerConfig(power_clocks="none")) as cap:
        with pytest.raises(Mismatch):
            await cap.cap(0.5, 1)
