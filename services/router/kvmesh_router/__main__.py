"""Runs the router: `python -m kvmesh_router`, configured by KVMESH_* (see `config.py` and `kvmesh.process.config`)."""

from __future__ import annotations

from kvmesh.process import main
from kvmesh_router.config import RouterConfig
from kvmesh_router.process import router

if __name__ == "__main__":
    main(RouterConfig, router)
