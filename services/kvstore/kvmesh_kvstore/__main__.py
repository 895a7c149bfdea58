"""Runs the kvstore: `python -m kvmesh_kvstore`, configured by KVMESH_* (see `config`)."""

from __future__ import annotations

from kvmesh.kv.heap import keep_freed_frames
from kvmesh.process import main
from kvmesh_kvstore.config import KvStoreConfig
from kvmesh_kvstore.process import kvstore

if __name__ == "__main__":
    keep_freed_frames()
    main(KvStoreConfig, kvstore)
