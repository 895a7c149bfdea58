"""`kvmesh up | generate | status | down | run` with real processes and the fake model: what starts also stops."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvmesh.cli.launch import free_port
from kvmesh.cli.processes import alive, started_at
from kvmesh.cli.state import StateFile

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(150)]

COMMAND = [sys.executable, "-c", "from kvmesh.cli.main import main; main()"]
GENERATE = ("generate", "Where?", "--temperature", "0", "--max-tokens", "16")


class Home:
    """A user's own state folder, and commands run in it."""

    def __init__(self, folder):
        self.folder = folder
        self.file = StateFile(home=folder / "kvmesh")
        self.environment = {**os.environ, "XDG_STATE_HOME": str(folder), "TMPDIR": str(folder)}
        self.environment.pop("KVMESH_ADDRESS", None)

    def start(self, *arguments, **variables):
        return subprocess.Popen(
            [*COMMAND, *arguments], env={**self.environment, **variables},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(self, *arguments, **variables):
        """(exit status, output, errors)."""
        process = self.start(*arguments, **variables)
        output, errors = process.communicate(timeout=120)
        return process.returncode, output, errors

    def up(self, *arguments):
        return self("up", "--model", "fake", "--port", str(free_port()), *arguments)

    def leftovers(self):
        """Processes whose environment names this folder, or that work in it (Redis overwrites the former)."""
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._is_mine(pid)]

    def _is_mine(self, pid):
        process = Path("/proc", str(pid))
        try:
            mine = os.fsencode(self.folder) in (process / "environ").read_bytes()
            mine |= str((process / "cwd").readlink()).startswith(str(self.folder))
        except OSError:
            return False
        return mine and started_at(pid) is not None


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


@pytest.fixture
def home(tmp_path):
    home = Home(tmp_path)
    yield home
    home("down")
    left = home.leftovers()
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


def test_up_generate_status_down(home):
    code, output, errors = home.up("--prefill", "1", "--decode", "2")
    assert code == 0, errors
    state = home.file.load()
    assert state.address in output
    assert len(state.processes) == 6
    code, first, errors = home(*GENERATE, "--timings")
    assert code == 0, errors
    assert len(first.strip()) > 0
    assert "first token" in errors
    assert home(*GENERATE)[1] == first

    code, output, _ = home("status", "--json", "--check")
    assert code == 0
    workers = {worker["worker_id"]: worker for worker in json.loads(output)}
    assert set(workers) == {"router-0", "prefill-0", "decode-0", "decode-1", "kvstore-0"}
    assert {worker["pid"] for worker in workers.values()} < {record.pid for record in state.processes}
    assert all(worker["statistics"]["leases"] == 0 for worker in workers.values())

    code, _, errors = home.up()
    assert (code, "already up" in errors) == (1, True)
    assert all(map(alive, state.processes))

    code, output, _ = home("down")
    assert (code, output) == (0, "stopped 6 processes\n")
    assert not any(map(alive, state.processes))
    assert home.file.load() is None
    assert home("down")[:2] == (0, "no mesh is up\n")


def test_a_mesh_that_died_does_not_block_the_next(home):
    assert home.up()[0] == 0
    for record in home.file.load().processes:
        os.kill(record.pid, signal.SIGKILL)
    wait_until(lambda: not any(map(alive, home.file.load().processes)))
    assert home("generate", "hi", "--raw")[0] == 1
    assert home.up()[0] == 0


def test_a_failing_start_shows_the_log_and_leaves_nothing(home):
    code, _, errors = home("up", "--model", "fake", "--port", str(free_port()), KVMESH_LEASE_TTL="soon")
    assert code == 1
    assert "ended with status" in errors
    assert "lease_ttl" in errors.lower()
    assert "Traceback" not in errors
    assert home.file.load() is None
    assert home.leftovers() == []


def test_run_answers_and_leaves_nothing(home):
    code, output, errors = home("run", "Where?", "--model", "fake", "--max-tokens", "8")
    assert code == 0, errors
    assert len(output.strip()) > 0
    for hop in ("queue", "prefill", "transfer", "first token", "per token"):
        assert hop in errors
    assert home.leftovers() == []
    assert home.file.load() is None


def test_run_refused_leaves_nothing(home):
    code, _, errors = home("run", "Where?", "--model", "fake", "--max-tokens", "1000000")
    assert (code, "max_tokens" in errors) == (1, True)
    assert home.leftovers() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_run_interrupted_leaves_nothing(home, number):
    slow = {"KVMESH_FAKE_STEP_SECONDS": "0.2"}
    process = home.start("run", "Where?", "--model", "fake", "--max-tokens", "2000", **slow)
    assert process.stdout.read(1)
    assert len(home.leftovers()) == 6
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    wait_until(lambda: home.leftovers() == [])


def test_foreground_stops_with_ctrl_c(home):
    process = home.start("up", "--foreground", "--model", "fake", "--port", str(free_port()))
    assert "kvmesh serves fake" in process.stdout.readline()
    assert home(*GENERATE)[0] == 0
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert home.leftovers() == []
    assert home.file.load() is None
