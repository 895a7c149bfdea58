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

    blob_url: str = ""
    """A remote tier: redis://…, or redis+cluster://… of a Redis or Valkey Cluster; empty: none."""
    blob_bytes: int = Field(default=4 << 30, gt=0)
    """Its budget, for all stores together."""
    blob_ttl: float = Field(default=86_400.0, gt=0)
    """A chunk that nobody reads for so long goes from there."""
    blob_timeout: float = Field(default=0.5, gt=0)
    """What one call to it may take."""
    replicas: int = Field(default=1, ge=1, le=16)
    """Stores that are to hold each chunk, as the router has it."""
    pull_rate: float = Field(default=float(64 << 20), ge=0)
    """Bytes a second at which chunks are copied that this store has come to own; 0: never."""
    pull_delay: float = Field(default=5.0, ge=0)
    """How long the mesh must have had the same stores before."""
    tenant_quota: float | None = Field(default=None, gt=0)
    """What chunks of one cache salt may take: bytes, or up to 1 a share, of memory and disk together and again of the
    remote tier."""

    @property
    def quota_bytes(self) -> int | None:
        """Of memory and disk together."""
        return self._quota_of(self.memory_bytes + self.disk_bytes)

    @property
    def blob_quota_bytes(self) -> int | None:
        """Of the remote tier."""
        return self._quota_of(self.blob_bytes)

    def _quota_of(self, budget: int) -> int | None:
        quota = self.tenant_quota
        return None if quota is None else int(quota if quota > 1 else quota * budget)

    @model_validator(mode="after")
    def _tiers(self) -> Self:
        if self.disk_bytes and self.disk_path is None:
            raise ValueError("KVMESH_DISK_BYTES needs a folder in KVMESH_DISK_PATH")
        if not self.memory_bytes and not self.disk_bytes:
            raise ValueError("KVMESH_MEMORY_BYTES and KVMESH_DISK_BYTES must not both be 0")
        schemes = tuple(f"redis{s}{c}://" for s in ("", "s") for c in ("", "+cluster"))
        if self.blob_url and not self.blob_url.startswith(schemes):
            raise ValueError(f"KVMESH_BLOB_URL must begin with one of {', '.join(schemes)}")
        return self
