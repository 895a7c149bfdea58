"""Compiles the native kernels with the system's compiler, once per source, flags and CPU, into the user's cache.

Where that is read-only, as in a container, a folder among the temporary files serves. Knows no torch and nothing of
what they compute. Processes that start together wait for one of them to compile.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from kvmesh.hub.cache import build_once
from kvmesh.hub.cache import default_cache as models_cache

LIBRARY = "kernels.so"
SOURCES = Path(__file__).parent / "kernel"
FLAGS = (
    "-std=c++17",
    "-O3",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fPIC",
    "-shared",
    "-pthread",
    "-fvisibility=hidden",
)
COMPILERS = ("c++", "g++", "clang++")
TARGETS = (("-march=native",), ("-mcpu=native",), ())
"""Tried in order; the last one is what any compiler takes for any CPU."""
TIMEOUT = 120.0


class CannotBuild(Exception):
    """There is no kernel on this machine; the message says why."""


def load_library(
    cache: Path | None = None,
    compilers: Sequence[str] = COMPILERS,
    targets: Sequence[tuple[str, ...]] = TARGETS,
) -> ctypes.CDLL:
    """The kernel, compiled into `cache` if it is not there yet, for the first target that compiles and loads.

    Raises:
        CannotBuild: no compiler, no target that compiles and loads, or a cache that cannot be written.
    """
    compiler = next(filter(None, map(shutil.which, compilers)), None)
    if compiler is None:
        raise CannotBuild(f"no compiler found of {', '.join(compilers)}")
    reasons = []
    for target in targets:
        try:
            return ctypes.CDLL(str(_compiled(compiler, target, cache or default_cache())))
        except (OSError, RuntimeError, CannotBuild, subprocess.SubprocessError) as error:
            reasons.append(str(error))
    raise CannotBuild("; ".join(reasons))


def default_cache() -> Path:
    """Where kernels are kept: beside the models in the user's cache, or among temporary files if that is read-only."""
    private = Path(tempfile.gettempdir()) / f"kvmesh-kernels-{os.getuid()}"
    return writable(models_cache().with_name("kernels"), private)


def writable(folder: Path, private: Path) -> Path:
    """`folder`, or `private` where that cannot be written: code is loaded from there, so it is this user's alone.

    Raises:
        CannotBuild: `private` belongs to somebody else, or is open to others.
    """
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK):
        return folder
    private.mkdir(mode=0o700, exist_ok=True)
    found = private.lstat()
    if found.st_uid != os.getuid() or found.st_mode != stat.S_IFDIR | 0o700:
        raise CannotBuild(f"{private} is not a folder of this user alone")
    return private


def _compiled(compiler: str, target: tuple[str, ...], cache: Path) -> Path:
    command = (compiler, *FLAGS, *target)
    folder = cache / f"kernels-{_fingerprint(command)}"
    return build_once(folder, partial(_compile, command)) / LIBRARY


def _compile(command: tuple[str, ...], folder: Path) -> None:
    arguments = [*command, "-o", str(folder / LIBRARY), str(SOURCES / "library.cpp")]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    if result.returncode:
        lines = result.stderr.strip().splitlines()
        raise CannotBuild(lines[0] if lines else f"the compiler ended with {result.returncode}")


def _fingerprint(command: tuple[str, ...]) -> str:
    """What a compiled kernel depends on; a cache may be shared by machines with unlike CPUs and compilers."""
    digest = hashlib.sha256("\0".join((*command, platform.machine(), _cpu())).encode())
    digest.update(str(os.stat(command[0]).st_mtime_ns).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _cpu() -> str:
    """The model and instruction sets of this CPU, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    told = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(told)}))
