"""How long work reports how far it is, and how a download is watched from outside. Draws nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol


class Progress(Protocol):
    """Called with what is being done, how much of it is, and how much there is, None if unknown.

    May be called from another thread than the one that started the work. A new description starts a new phase.
    """

    def __call__(self, description: str, completed: int, total: int | None) -> None: ...


def silent(description: str, completed: int, total: int | None) -> None:
    """Reports nothing."""


@contextmanager
def watch(folder: Path, description: str, total: int | None, progress: Progress) -> Iterator[None]:
    """Reports the bytes under `folder` a few times a second while the body fills it."""
    done = threading.Event()

    def report() -> None:
        while not done.wait(0.2):
            size = _size(folder)
            progress(description, min(size, total) if total else size, total)

    thread = threading.Thread(target=report, name="download-progress", daemon=True)
    progress(description, 0, total)
    thread.start()
    try:
        yield
        if total:
            progress(description, total, total)
    finally:
        done.set()
        thread.join()


def _size(folder: Path) -> int:
    """Bytes on disk; files may come and go while we look."""
    size = 0
    for file in folder.rglob("*"):
        try:
            size += file.stat().st_size if file.is_file() else 0
        except OSError:
            continue
    return size
