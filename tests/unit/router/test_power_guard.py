"""The router near its power budget: fewer requests start, low priority first, and all come back."""

import asyncio

import pytest

from kvmesh.errors import Overloaded
from kvmesh.rpc.deadline import Deadline
from kvmesh.scheduling.admission import Admission, Admitted, Queued, Refused
from kvmesh.scheduling.power import Level, PowerPolicy
from kvmesh.telemetry.metrics import Metrics, NoopInstruments
from kvmesh.v1.common_pb2 import WorkerStatistics
from kvmesh_router.gate import Gate
from kvmesh_router.power import PowerGuard, by_domain
from kvmesh_router.session import Session


async def nothing():
    return {}


async def leave_clocks(share):
    raise AssertionError(share)


def guard(gate, read=nothing, cap=leave_clocks):
    return PowerGuard(PowerPolicy(1000), gate, read, Metrics(NoopInstruments()), cap)


def running(count, max_running=100):
    admission = Admission(max_running, 10)
    for number in range(count):
        admission.submit(number, 0, 100)
    return admission


def test_domains_are_counted_once():
    readings = [
        WorkerStatistics(power_watts=watts, power_domain=domain)
        for watts, domain in ((200, "host/rapl"), (210, "host/rapl"), (300, "GPU-1"), (0, ""))
    ]
    assert by_domain(readings) == {"host/rapl": 210, "GPU-1": 300}


async def test_low_priority_is_refused_first():
    gate = Gate(running(8))
    guard(gate).observe({"host": 850}, now=0)
    assert gate.admission.limit == 100
    refused = gate.admission.submit("low", 0, 100, low_priority=True)
    assert isinstance(refused, Refused)
    assert "until there is power again" in refused.why
    assert isinstance(gate.admission.submit("high", 0, 100), Admitted)
    with pytest.raises(Overloaded, match="low priority"):
        async with gate.enter(Session("x", Deadline.after(10)), low_priority=True):
            pass


async def test_the_brake_narrows_the_gate_and_calm_widens_it():
    gate = Gate(running(8))
    watch = guard(gate)
    watch.observe({"host": 1100}, now=0)
    assert gate.admission.limit == 2
    assert isinstance(gate.admission.submit("later", 0, 1e9), Queued)
    assert gate.admission.check_integrity() == []
    for second in range(1, 200):
        watch.observe({"host": 100}, now=second)
    assert watch.policy.level is Level.FREE
    assert gate.admission.limit == 100
    assert gate.admission.waiting == 0
    assert gate.admission.running == 9


async def test_without_meters_nothing_is_limited():
    gate = Gate(running(8))
    async with guard(gate).watching():
        await asyncio.sleep(0)
    assert gate.admission.limit == 100


async def test_clocks_are_capped_each_second_while_the_brake_is_on():
    capped = asyncio.Queue()

    async def read():
        return {"host": 1100}

    async with guard(Gate(running(8)), read, capped.put).watching(), asyncio.timeout(10):
        assert [await capped.get() for _ in range(2)] == [pytest.approx(288 / 1410)] * 2


def test_what_runs_goes_on_when_the_limit_falls():
    admission = running(8)
    assert admission.narrow(2, 0, now=0) == []
    assert admission.running == 8
    assert isinstance(admission.submit("next", 0, 100), Queued)
    for number in range(6):
        assert admission.finish(number, 1) == []
    assert admission.finish(6, 1) == ["next"]
    assert admission.check_integrity() == []
