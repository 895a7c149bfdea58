"""Runs the prefill service: `python -m kvmesh_prefill`, configured by KVMESH_* (see `kvmesh.worker.config`)."""

from __future__ import annotations

from kvmesh.process import main
from kvmesh_prefill.config import PrefillConfig
from kvmesh_prefill.process import prefill

if __name__ == "__main__":
    main(PrefillConfig, prefill)
