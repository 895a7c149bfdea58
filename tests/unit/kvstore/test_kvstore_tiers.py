"""Files that are whole or not there, whatever happened while they were written."""

import numpy as np
import pytest

from kvmesh.errors import Unavailable
from kvmesh.kv.bitstream import encode, read_header
from kvmesh_kvstore.chunks import Entry, Offer, Tier, Traits
from kvmesh_kvstore.tiers import DiskTier

KEY = bytes(range(32))
BITS = encode(np.arange(16, dtype="<f4").reshape(1, 2, 2, 1, 4), "float32", 0)
TRAITS = Traits.of(read_header(BITS), len(BITS))
HEAD = TRAITS.layer_ends[-1] - TRAITS.raw_bytes
OTHER = encode(np.ones((1, 2, 2, 1, 4), "<f4"), "float32", 0)


@pytest.fixture
def disk(tmp_path):
    disk = DiskTier(tmp_path)
    disk.open()
    yield disk
    disk.close()


def entry(serial: int = 1, **changes) -> Entry:
    fields = {"key": KEY, "fingerprint": "näme", "size": len(BITS), "parent": b"p" * 32, "tenant": b"t" * 16}
    return Entry(Offer(**{**fields, **changes}), TRAITS, serial, Tier.DISK)


def test_a_blob_comes_back_and_is_found_again(disk):
    disk.write(entry(), BITS)
    disk.write(entry(2, parent=b"", key=b"k" * 32), OTHER)
    assert disk.read(entry()) == BITS
    found = disk.scan()
    assert {each.traits for each in found} == {TRAITS}
    assert {(each.offer, each.serial) for each in found} == {
        (entry().offer, 1),
        (entry(parent=b"", key=b"k" * 32).offer, 2),
    }
    assert disk.serials() == {1, 2}


def test_deleting_an_old_blob_leaves_the_new_one_of_its_key(disk):
    disk.write(entry(1), BITS)
    disk.write(entry(2), OTHER)
    disk.delete(entry(1))
    disk.delete(entry(1))
    assert disk.read(entry(2)) == OTHER
    with pytest.raises(FileNotFoundError):
        disk.read(entry(1))


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.rename(path.with_name(path.name + ".part")),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes() + b"x"),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"X" + path.read_bytes()[1:]),
        lambda path: path.rename(path.with_name("ff" * 32 + ".1")),
    ],
)
def test_a_scan_deletes_what_is_not_a_whole_blob(disk, tmp_path, harm):
    disk.write(entry(), BITS)
    harm(next(tmp_path.glob("??/*")))
    assert disk.scan() == []
    assert list(tmp_path.glob("??/*")) == []


def test_any_flipped_byte_of_a_files_header_is_noticed(disk, tmp_path):
    disk.write(entry(), BITS)
    path = next(tmp_path.glob("??/*"))
    whole = path.read_bytes()
    for i in range(len(whole) - len(BITS) + HEAD):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        assert disk.scan() == []


def test_a_scan_drops_tails_and_leaves_strangers_alone(disk, tmp_path):
    disk.write(entry(tail=True), BITS)
    stranger = tmp_path / "ab" / "notes.txt"
    stranger.parent.mkdir()
    stranger.write_text("mine")
    assert disk.scan() == []
    assert stranger.read_text() == "mine"
    assert disk.serials() == set()


def test_a_write_that_fails_leaves_nothing(disk, tmp_path):
    (tmp_path / KEY.hex()[:2]).mkdir()
    (tmp_path / KEY.hex()[:2] / f"{KEY.hex()}.1").mkdir()
    with pytest.raises(OSError, match="directory"):
        disk.write(entry(), BITS)
    assert list(tmp_path.rglob("*.part")) == []


def test_a_folder_that_cannot_be_had_is_one_clear_error(tmp_path, disk):
    with pytest.raises(Unavailable, match="in use by another"):
        DiskTier(tmp_path).open()
    (tmp_path / "file").touch()
    with pytest.raises(Unavailable, match="cannot keep chunks"):
        DiskTier(tmp_path / "file").open()
