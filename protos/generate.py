"""Generates the Python code of the contract: `python protos/generate.py [OUTPUT_ROOT]` (default: src).

The generators are pinned by the extra `[protos]`: code from an old generator loads on newer runtimes, never the other
way round, so what is checked in is made by grpcio-tools 1.76.0 and mypy-protobuf 5.1.0.
"""

import sys
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

PROTOS = Path(__file__).parent


def generate(output: Path) -> int:
    """Writes `kvmesh/v1/*_pb2*.py[i]` below `output`; returns protoc's exit status."""
    sources = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.glob("kvmesh/v1/*.proto"))
    well_known = str(files("grpc_tools") / "_proto")
    outs = [f"--{kind}={output}" for kind in ("python_out", "grpc_python_out")]
    stubs = [f"--{kind}=quiet:{output}" for kind in ("mypy_out", "mypy_grpc_out")]
    # The plugins of this very environment, on PATH or not.
    plugins = [
        f"--plugin={name}={Path(sys.executable).parent / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")
    ]
    return int(protoc.main(["protoc", f"-I{PROTOS}", f"-I{well_known}", *plugins, *outs, *stubs, *sources]))


if __name__ == "__main__":
    sys.exit(generate(Path(sys.argv[1]) if len(sys.argv) > 1 else PROTOS.parent / "src"))
