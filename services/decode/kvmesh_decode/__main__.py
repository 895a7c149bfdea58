"""Runs the decode service: `python -m kvmesh_decode`, configured by KVMESH_* (see `kvmesh.worker.config`)."""

from __future__ import annotations

from kvmesh.process import main
from kvmesh_decode.config import DecodeConfig
from kvmesh_decode.process import decode

if __name__ == "__main__":
    main(DecodeConfig, decode)
