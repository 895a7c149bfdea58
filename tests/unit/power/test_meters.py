"""Meters on trees and libraries that behave like the kernel's and NVIDIA's."""

import os
from types import SimpleNamespace

import pytest

from kvmesh.errors import Unavailable
from kvmesh.power.find import first, wattmeter
from kvmesh.power.meter import Wattmeter
from kvmesh.power.nvml import NvmlClocks, NvmlMeter, devices
from kvmesh.power.rapl import RaplMeter

RANGE = 1_000_000


def zone(root, name, energy):
    path = root / name
    path.mkdir()
    (path / "energy_uj").write_text(f"{energy}\n")
    (path / "max_energy_range_uj").write_text(f"{RANGE}\n")
    return path / "energy_uj"


def test_rapl_adds_packages_and_leaves_out_their_parts(tmp_path):
    packages = [zone(tmp_path, f"intel-rapl:{number}", 100) for number in range(2)]
    inner = zone(tmp_path, "intel-rapl:0:0", 100)
    meter = RaplMeter.open("host", tmp_path)
    packages[0].write_text("500100")
    packages[1].write_text("250100")
    inner.write_text("400100")
    assert meter.joules() == pytest.approx(0.75)
    assert meter.domain == "host/rapl"


def test_rapl_counters_wrap(tmp_path):
    counter = zone(tmp_path, "intel-rapl:0", 900_000)
    meter = RaplMeter.open("host", tmp_path)
    counter.write_text("100000")
    assert meter.joules() == pytest.approx(0.2)
    counter.write_text("300000")
    assert meter.joules() == pytest.approx(0.4)


def test_rapl_is_missing(tmp_path):
    with pytest.raises(Unavailable, match="no RAPL counters under"):
        RaplMeter.open("host", tmp_path)


def test_rapl_may_not_be_read(tmp_path):
    counter = zone(tmp_path, "intel-rapl:0", 1)
    counter.chmod(0)
    if os.access(counter, os.R_OK):
        counter.unlink()
        counter.mkdir()  # Root reads everything but a folder.
        message = "energy_uj cannot be read"
    else:
        message = "may be read by root alone: run as root, or open it by a udev rule"
    with pytest.raises(Unavailable, match=message):
        RaplMeter.open("host", tmp_path)


def test_rapl_that_vanishes(tmp_path):
    counter = zone(tmp_path, "intel-rapl:0", 1)
    meter = RaplMeter.open("host", tmp_path)
    counter.unlink()
    with pytest.raises(Unavailable, match="cannot be read"):
        meter.joules()


class FakeNvml:
    """Two accelerators of 1410 MHz."""

    NVML_ERROR_NO_PERMISSION, NVML_CLOCK_SM = 4, 1

    class NVMLError(Exception):
        def __init__(self, value):
            super().__init__(f"code {value}")
            self.value = value

    def __init__(self, allowed=True):
        self.allowed, self.clocks, self.millijoules = allowed, {}, {"gpu-0": 1000, "gpu-1": 5000}

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):
        if index > 1:
            raise self.NVMLError(2)
        return f"gpu-{index}"

    def nvmlDeviceGetUUID(self, handle):
        return handle.upper()

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return self.millijoules[handle]

    def nvmlDeviceGetMaxClockInfo(self, handle, clock):
        return 1410

    def nvmlDeviceSetGpuLockedClocks(self, handle, low, high):
        if not self.allowed:
            raise self.NVMLError(4)
        self.clocks[handle] = (low, high)

    def nvmlDeviceResetGpuLockedClocks(self, handle):
        self.clocks.pop(handle, None)


def test_nvml_energy_and_domain():
    library = FakeNvml()
    meters = [NvmlMeter(library, handle) for handle in devices(library)]
    assert [meter.joules() for meter in meters] == [1.0, 5.0]
    assert Wattmeter(meters).domain == "GPU-0+GPU-1"
    assert devices(library, [1]) == ["gpu-1"]


def test_nvml_without_such_an_accelerator():
    with pytest.raises(Unavailable, match=r"does not know the accelerators \[7\]"):
        devices(FakeNvml(), [7])


def test_nvml_locks_and_frees_clocks():
    library = FakeNvml()
    clocks = NvmlClocks(library, devices(library))
    clocks.cap(1110 / 1410)
    assert library.clocks == {"gpu-0": (1110, 1110), "gpu-1": (1110, 1110)}
    clocks.cap(1)
    assert library.clocks == {}


def test_nvml_says_that_it_may_not():
    with pytest.raises(Unavailable, match="clocks may be set by root alone"):
        NvmlClocks(FakeNvml(allowed=False), ["gpu-0"]).cap(0.5)


def test_watts_are_joules_over_time():
    counter = SimpleNamespace(domain="x", total=100.0)
    counter.joules = lambda: counter.total
    meter = Wattmeter([counter])
    meter.sample(10.0)
    assert (meter.watts, meter.joules) == (0.0, 0.0)
    counter.total = 160.0
    meter.sample(12.0)
    assert (meter.watts, meter.joules) == (30.0, 60.0)
    meter.sample(12.0)
    assert meter.watts == 30.0


def missing():
    raise Unavailable("there is none")


def test_what_a_setting_asks_for():
    meter = SimpleNamespace(domain="there")
    kinds = {"nvml": missing, "rapl": lambda: [meter]}
    assert wattmeter("none", "host") is None
    assert first("auto", kinds).domain == "there"
    assert first("auto", {"nvml": missing, "rapl": missing}) is None
    with pytest.raises(Unavailable, match="there is none"):
        first("nvml", kinds)
