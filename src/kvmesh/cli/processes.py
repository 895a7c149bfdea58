"""Child processes with a log file: start, recognise, stop.

Knows pids and signals, not what the processes do. Linux and macOS.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kvmesh.cli.state import ProcessRecord

PR_SET_PDEATHSIG = 1
POLL_SECONDS = 0.05


def spawn(
    name: str, command: Sequence[str], environment: Mapping[str, str], log: Path, *, die_with_parent: bool
) -> tuple[subprocess.Popen[bytes], ProcessRecord]:
    """Starts `command` in a session of its own, its output in `log`.

    `die_with_parent`: the kernel ends it when this process dies, however it dies (Linux only).
    """
    log.write_bytes(b"")
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_death_signal() if die_with_parent else None,
        )
    return process, ProcessRecord(name, process.pid, started_at(process.pid) or "", str(log))


def _death_signal() -> Callable[[], None] | None:
    """What a child runs before exec, made before the fork since little is safe after it."""
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def request() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return request


def started_at(pid: int) -> str | None:
    """When a process started, in the system's own words; None if it is gone or only waits to be reaped."""
    if sys.platform != "linux":
        output = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
        return output.stdout.strip() or None
    try:
        # The command, in parentheses, may hold anything; fields are counted after it. See proc(5).
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def alive(record: ProcessRecord) -> bool:
    """True if the process recorded still runs, and not another one with its pid."""
    return started_at(record.pid) == record.started_at


def stop(records: Sequence[ProcessRecord], grace: float) -> list[ProcessRecord]:
    """Stops processes together: SIGTERM, up to `grace` seconds to drain, then SIGKILL; returns those killed."""
    _signal(records, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while any(map(alive, records)) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    stubborn = [record for record in records if alive(record)]
    # A stopped process (SIGSTOP) does not see SIGTERM, but SIGKILL reaches it.
    _signal(stubborn, signal.SIGKILL)
    return stubborn


def _signal(records: Sequence[ProcessRecord], number: signal.Signals) -> None:
    for record in filter(alive, records):
        with contextlib.suppress(ProcessLookupError):
            os.kill(record.pid, number)


def last_lines(log: str, count: int = 12) -> str:
    """The end of a log file."""
    try:
        return "\n".join(Path(log).read_text(errors="replace").splitlines()[-count:])
    except OSError:
        return ""
