"""The model cache on disk: a folder appears whole or not at all, and one process makes it. Knows no format."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/kvmesh/models`, by default under `~/.cache`."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "kvmesh" / "models"


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Returns `target`, built by `build(temporary folder)` if it is not there; other processes wait meanwhile."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(target.parent / f".{target.name}.lock"):
        if not target.exists():
            with scratch(target.parent) as temporary:
                build(temporary)
                temporary.rename(target)
    return target


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A temporary folder beside its destination, so that a rename is atomic; gone afterwards."""
    path = Path(tempfile.mkdtemp(prefix=".partial-", dir=parent))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
