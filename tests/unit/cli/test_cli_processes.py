"""Processes and what is recorded of them: nothing that is not ours is ever signalled."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from kvmesh.cli.launch import check_port_free, free_port
from kvmesh.cli.mesh import memory_settings, refuse_running
from kvmesh.cli.plan import MeshPlan, parse_size
from kvmesh.cli.processes import alive, last_lines, spawn, started_at, stop
from kvmesh.cli.render import duration
from kvmesh.cli.state import MeshState, ProcessRecord, StateFile
from kvmesh.errors import AlreadyExists, InvalidArgument
from kvmesh.types import Role

SLEEPER = (sys.executable, "-c", "print('up', flush=True); import time; time.sleep(60)")
STUBBORN = (
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)",
)


@pytest.fixture
def start(tmp_path):
    """Starts a command and waits until it has printed something."""
    children = []

    def run(command, name="sleeper-0", **options):
        log = tmp_path / f"{name}.log"
        child, record = spawn(name, command, {}, log, **{"die_with_parent": False, **options})
        children.append(child)
        wait_until(lambda: log.read_text())
        return child, record

    yield run
    for child in children:
        child.kill()
        child.wait()


def wait_until(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came true")


def test_stop_ends_a_process(start):
    child, record = start(SLEEPER)
    assert alive(record)
    assert stop([record], grace=10) == []
    assert child.wait() == -signal.SIGTERM
    assert not alive(record)


def test_a_stubborn_process_is_killed(start):
    child, record = start(STUBBORN)
    assert stop([record], grace=0.2) == [record]
    assert child.wait() == -signal.SIGKILL


def test_a_frozen_process_is_killed(start):
    child, record = start(SLEEPER)
    os.kill(child.pid, signal.SIGSTOP)
    stop([record], grace=0.2)
    assert child.wait() < 0


def test_another_process_with_the_pid_is_left_alone(start):
    child, record = start(SLEEPER)
    stop([replace(record, started_at="1")], grace=0.0)
    assert child.poll() is None
    assert alive(record)


def test_a_process_that_is_gone_has_no_start():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert started_at(child.pid) is None


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux")
def test_children_die_with_a_killed_parent(tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "child.log")], stdout=subprocess.PIPE, text=True
    )
    pid = int(parent.stdout.readline())
    wait_until(lambda: (tmp_path / "child.log").read_text())
    parent.kill()
    parent.wait()
    wait_until(lambda: started_at(pid) is None)


PARENT = f"""
import sys, time
from pathlib import Path
from kvmesh.cli.processes import spawn
child, _ = spawn("child", {SLEEPER!r}, {{}}, Path(sys.argv[1]), die_with_parent=True)
print(child.pid, flush=True)
time.sleep(60)
"""


def test_output_goes_to_the_log(start, tmp_path):
    child, record = start((sys.executable, "-c", "for i in range(40): print('line', i)"))
    child.wait()
    assert last_lines(record.log, 2) == "line 38\nline 39"
    assert last_lines(str(tmp_path / "none")) == ""


def test_state_round_trip(tmp_path):
    file = StateFile("two", tmp_path)
    assert file.load() is None
    state = MeshState("two", "fake", "127.0.0.1:5", "redis://x", (ProcessRecord("router-0", 4, "99", "log"),))
    file.save(state)
    assert file.load() == state
    assert StateFile("other", tmp_path).load() is None
    file.delete()
    file.delete()
    assert file.load() is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"processes": [{"pid": 1}]}', '{"processes": 3}'])
def test_a_broken_state_file_is_none(tmp_path, text):
    file = StateFile("x", tmp_path)
    file.path.write_text(text)
    assert file.load() is None


def test_the_lock_is_exclusive(tmp_path):
    with StateFile("x", tmp_path).lock():
        with pytest.raises(AlreadyExists), StateFile("x", tmp_path).lock():
            pass
        with StateFile("y", tmp_path).lock():
            pass


def test_a_running_mesh_is_refused_and_a_dead_one_is_not(start):
    child, record = start(SLEEPER)
    state = MeshState("default", "fake", "127.0.0.1:5", "", (record,))
    with pytest.raises(AlreadyExists, match=r"127\.0\.0\.1:5"):
        refuse_running(state)
    child.kill()
    child.wait()
    refuse_running(state)
    refuse_running(None)


def test_plan_names_every_process_once():
    plan = MeshPlan("fake", prefill=2, decode=3, kvstore=1, port=7000, settings={"KVMESH_LEASE_TTL": "3"})
    services = plan.services("redis://r")
    roles = [Role.KVSTORE, *[Role.PREFILL] * 2, *[Role.DECODE] * 3, Role.ROUTER]
    assert [service.role for service in services] == roles
    assert len({service.name for service in services}) == 7
    router, decode = services[-1], services[-2]
    assert router.command[1:] == ("-m", "kvmesh_router")
    assert (router.environment["KVMESH_PORT"], decode.environment["KVMESH_PORT"]) == ("7000", "0")
    assert decode.environment["KVMESH_LEASE_TTL"] == "3"
    assert decode.environment["KVMESH_REDIS_URL"] == "redis://r"


@pytest.mark.parametrize(
    ("text", "size"),
    [("512", 512), ("512MiB", 512 << 20), ("2GB", 2 * 10**9), ("1.5G", 3 << 29), (" 4 kib ", 4096), ("7b", 7)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1", "0", "1.2.3G", "12 parsecs", "nan", "infG", "5bb"])
def test_bad_sizes(text):
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


def test_all_bad_sizes_are_named():
    with pytest.raises(InvalidArgument, match=r"'x'.*'y'"):
        memory_settings("x", "y")
    assert memory_settings("1k", None, "2k") == {"KVMESH_KV_MEMORY": "1024", "KVMESH_DISK_BYTES": "2048"}


def test_ports():
    check_port_free(free_port())
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(AlreadyExists, match=f"port {port} is taken"):
            check_port_free(port)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 µs"),
        (0.00085, "850 µs"),
        (0.0125, "12.5 ms"),
        (0.9999, "1.00 s"),
        (3.2, "3.20 s"),
        (300, "5 min"),
        (7200, "2.0 h"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
