"""What the decode service can be told: all of `WorkerConfig`, and so far nothing of its own."""

from __future__ import annotations

from kvmesh.worker.config import WorkerConfig


class DecodeConfig(WorkerConfig):
    """See `WorkerConfig`."""
