"""What the kvstore can be told, by environment variables of prefix KVMESH_, beside what every process can."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from kvmesh.process import ProcessConfig


class KvStoreConfig(ProcessConfig):
    """Seconds and bytes where nothing else is said."""

    memory_bytes: int = Field(default=1 << 30, ge=0)
    disk_bytes: int = Field(default=0, ge=0)
    """0: no disk tier."""
    disk_path: Path | None = None
    """A folder of its own, needed for a disk tier; what it holds is served again after a restart."""

    @model_validator(mode="after")
    def _tiers(self) -> Self:
        if self.disk_bytes and self.disk_path is None:
            raise ValueError("KVMESH_DISK_BYTES needs a folder in KVMESH_DISK_PATH")
        if not self.memory_bytes and not self.disk_bytes:
            raise ValueError("KVMESH_MEMORY_BYTES and KVMESH_DISK_BYTES must not both be 0")
        return self
