"""What `kvmesh up` leaves behind for the other commands: one JSON file per mesh.

Knows paths and fields, not processes: a file may outlive what it names, and readers must check.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from kvmesh.errors import AlreadyExists

DEFAULT_NAME = "default"


@dataclass(frozen=True, slots=True)
class ProcessRecord:
    """A process that was started: `started_at` tells it from a later one with the same pid."""

    name: str
    pid: int
    started_at: str
    log: str


@dataclass(frozen=True, slots=True)
class MeshState:
    """A mesh on this machine; `address` is empty while it is starting. Processes in the order of starting."""

    name: str
    model: str
    address: str
    redis_url: str
    processes: tuple[ProcessRecord, ...] = ()


def state_home() -> Path:
    """$XDG_STATE_HOME/kvmesh, by default ~/.local/state/kvmesh."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "kvmesh"


class StateFile:
    """The record of the mesh called `name`."""

    def __init__(self, name: str = DEFAULT_NAME, home: Path | None = None) -> None:
        self._home = home or state_home()
        self.path = self._home / f"{name}.json"
        self.logs = self._home / f"{name}.logs"
        self.chunks = self._home / f"{name}.chunks"
        """The disk tiers of its stores."""

    def load(self) -> MeshState | None:
        """None if there is none, or if it is not readable as one."""
        try:
            fields = json.loads(self.path.read_text())
            processes = tuple(ProcessRecord(**record) for record in fields.pop("processes"))
            return MeshState(processes=processes, **fields)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def save(self, state: MeshState) -> None:
        """Replaces the file in one step: a reader sees the old or the new."""
        self._home.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".new")
        fresh.write_text(json.dumps(asdict(state), indent=2) + "\n")
        fresh.replace(self.path)

    def delete(self) -> None:
        self.path.unlink(missing_ok=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held while a mesh starts or stops.

        Raises:
            AlreadyExists: another command holds it.
        """
        self._home.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise AlreadyExists("another kvmesh command is starting or stopping this mesh") from error
            yield
