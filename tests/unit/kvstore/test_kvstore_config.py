"""What is wrong with an environment is said at once, all of it, without a traceback."""

import os
import subprocess
import sys

import pytest

from kvmesh_kvstore.config import KvStoreConfig


def test_defaults_serve_from_memory_on_loopback():
    config = KvStoreConfig()
    assert (config.host, config.disk_bytes, config.memory_bytes) == ("127.0.0.1", 0, 1 << 30)


def test_a_disk_needs_a_folder(tmp_path):
    with pytest.raises(ValueError, match="KVMESH_DISK_PATH"):
        KvStoreConfig(disk_bytes=5)
    assert KvStoreConfig(disk_bytes=5, disk_path=tmp_path).disk_path == tmp_path


def test_all_bad_values_are_reported_together():
    bad = {"KVMESH_PORT": "70000", "KVMESH_MEMORY_BYTES": "lots", "KVMESH_LOG_LEVEL": "loud"}
    ended = subprocess.run(
        [sys.executable, "-m", "kvmesh_kvstore"],
        env={**os.environ, **bad, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.returncode == 2
    assert all(name in ended.stderr for name in bad)
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_neither_torch_nor_the_engine_is_imported():
    walls = "('torch', 'kvmesh.engine')"
    code = f"import sys, kvmesh_kvstore.__main__; print(*(m for m in sys.modules if m.startswith({walls})))"
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.strip() == ""
