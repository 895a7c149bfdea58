"""Runs a mixed worker: `python -m kvmesh_mixed`, configured by KVMESH_* (see `kvmesh.worker.config`)."""

from __future__ import annotations

from kvmesh.process import main
from kvmesh_mixed.config import MixedConfig
from kvmesh_mixed.process import mixed

if __name__ == "__main__":
    main(MixedConfig, mixed)
