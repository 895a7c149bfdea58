"""Which processes a mesh on this machine consists of: pure, from options to commands and environments."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kvmesh.types import Role

FAKE_MODEL = "fake"
HOST = "127.0.0.1"
DEFAULT_PORT = 50051


@dataclass(frozen=True, slots=True)
class ServicePlan:
    """One process to start. `name` is its worker id."""

    name: str
    role: Role
    command: tuple[str, ...]
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class MeshPlan:
    """A mesh on loopback. `settings` (KVMESH_* by name) reach every process; `prefix` begins each worker id.

    In KVMESH_DISK_PATH each store gets a folder of its own.
    """

    model: str
    prefill: int = 1
    decode: int = 1
    kvstore: int = 1
    port: int = DEFAULT_PORT
    prefix: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    mixed: int = 0

    def services(self, redis_url: str) -> list[ServicePlan]:
        """Stores first and the router last: each finds what it needs already starting."""
        workers = {Role.PREFILL: self.prefill, Role.DECODE: self.decode, Role.MIXED: self.mixed}
        counts = {Role.KVSTORE: self.kvstore, **workers, Role.ROUTER: 1}
        return [self._service(role, i, redis_url) for role, count in counts.items() for i in range(count)]

    def _service(self, role: Role, number: int, redis_url: str) -> ServicePlan:
        name = f"{self.prefix}{role}-{number}"
        environment = {
            **self.settings,
            "KVMESH_REDIS_URL": redis_url,
            "KVMESH_HOST": HOST,
            "KVMESH_PORT": str(self.port if role is Role.ROUTER else 0),
            "KVMESH_WORKER_ID": name,
            "KVMESH_MODEL": self.model,
            "PYTHONUNBUFFERED": "1",
        }
        if folder := self.settings.get("KVMESH_DISK_PATH"):
            environment["KVMESH_DISK_PATH"] = str(Path(folder) / name)
        return ServicePlan(name, role, (sys.executable, "-m", f"kvmesh_{role}"), environment)


def model_argument(model: str) -> str:
    """A folder or file by its absolute path, a name as it is."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.exists() else model


def parse_size(text: str) -> int:
    """Bytes from '512', '512MiB', '2GB' or '1.5G' (bare letters are binary).

    Raises:
        ValueError: it is none of these, or not positive.
    """
    units = {"": 1, "b": 1}
    for power, letter in enumerate("kmgt", start=1):
        units |= {letter: 1024**power, f"{letter}ib": 1024**power, f"{letter}b": 1000**power}
    digits = text.strip().lower().rstrip("kmgtib")
    unit = text.strip().lower()[len(digits) :]
    try:
        size = int(float(digits) * units[unit.strip()])
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise ValueError(f"{text!r} is not a size such as 512MiB")
    return size
