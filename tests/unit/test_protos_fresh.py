"""The checked-in code is what protos/generate.py makes of the contract, and the contract passes buf's STANDARD lint.

The pinned generators live in this environment or in one of their own (`.venv-protos`), as they want an old protobuf.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PINNED = ["grpcio-tools==1.76.0", "mypy-protobuf==5.1.0"]
INSTALLED = """
import sys
from importlib.metadata import distributions
found = {f"{each.name}=={each.version}" for each in distributions()}
sys.exit(not found.issuperset(sys.argv[1:]))
"""


def generator():
    """The interpreter that has the pinned generators."""
    candidates = [Path(sys.executable), ROOT / ".venv-protos/bin/python"]
    for python in candidates:
        if python.exists() and subprocess.run([python, "-c", INSTALLED, *PINNED], timeout=60).returncode == 0:
            return python
    pytest.skip(f"not installed: {', '.join(PINNED)} (extra [protos])")


def run(*command, python, cwd=ROOT):
    """With the programs of that interpreter's environment first on PATH."""
    path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def generated(root):
    return {path.name: path.read_bytes() for path in (root / "kvmesh/v1").glob("*_pb2*.py*")}


def test_the_checked_in_code_matches_the_contract(tmp_path):
    python = generator()
    done = run(python, ROOT / "protos/generate.py", tmp_path, python=python)
    assert done.returncode == 0, done.stderr
    fresh, checked_in = generated(tmp_path), generated(ROOT / "src")
    assert sorted(fresh) == sorted(checked_in)
    assert [name for name in fresh if fresh[name] != checked_in[name]] == []


def test_the_contract_passes_buf_lint():
    python = generator()
    done = run(python.parent / "buf", "lint", python=python, cwd=ROOT / "protos")
    assert done.returncode == 0, done.stdout + done.stderr
