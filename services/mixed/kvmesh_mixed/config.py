"""What a mixed worker can be told: all that prefill and decode can."""

from __future__ import annotations

from kvmesh_decode.config import DecodeConfig
from kvmesh_prefill.config import PrefillConfig


class MixedConfig(PrefillConfig, DecodeConfig):
    """See `kvmesh.worker.config.WorkerConfig`."""
