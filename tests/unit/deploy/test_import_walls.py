"""What must run without torch runs where torch cannot be imported."""

import subprocess
import sys

import pytest

LIGHT = (
    "kvmesh_router.__main__",
    "kvmesh_kvstore.__main__",
    "kvmesh.engine.fake",
    "kvmesh.cli.main",
    "kvmesh.client",
    "kvmesh.kv.codecs.choice",
)
BLOCKED = ("torch", "transformers", "flashinfer")


def import_without(module, blocked):
    walls = "; ".join(f"sys.modules[{name!r}] = None" for name in blocked)
    return subprocess.run(
        [sys.executable, "-c", f"import sys; {walls}; import importlib; importlib.import_module({module!r})"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_without_torch(module):
    result = import_without(module, BLOCKED)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("module", ["kvmesh_router.__main__", "kvmesh_kvstore.__main__"])
def test_router_and_kvstore_hold_no_engine(module):
    result = import_without(module, ("kvmesh.engine", "kvmesh.worker"))
    assert result.returncode == 0, result.stderr


def test_the_client_needs_no_service_extra():
    result = import_without("kvmesh.client", ("redis", "numpy", "tokenizers", "opentelemetry.sdk"))
    assert result.returncode == 0, result.stderr


def test_the_block_works():
    """Else the tests above would prove nothing."""
    assert import_without("torch", BLOCKED).returncode != 0
