"""Parts of a put stream become whole chunks, or an error that names the part."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.errors import InvalidArgument
from kvmesh.kv.bitstream import MAX_BITSTREAM_BYTES
from kvmesh_kvstore.chunks import Offer
from kvmesh_kvstore.incoming import MAX_FRAME_BYTES, Assembly

KEY = b"k" * 32


def offer(size: int, **changes) -> Offer:
    return Offer(**{"key": KEY, "fingerprint": "f", "size": size, **changes})


@given(st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=9), st.booleans())
def test_a_chunk_is_its_parts(parts, keep):
    assembly = Assembly()
    for _ in range(2):
        assembly.check(offer(len(b"".join(parts))))
        assembly.open(offer(len(b"".join(parts))), keep)
        *early, last = [assembly.feed(part) for part in parts]
        assert early == [None] * len(early)
        assert last.bitstream == (b"".join(parts) if keep else b"")
    assembly.end()


@pytest.mark.parametrize(
    ("bad", "name"),
    [
        (offer(5, key=b"short"), "key"),
        (offer(5, parent=b"short"), "parent_key"),
        (offer(5, parent=KEY), "parent_key"),
        (offer(0), "size"),
        (offer(MAX_BITSTREAM_BYTES + 1), "size"),
        (offer(5, fingerprint=""), "fingerprint"),
        (offer(5, fingerprint="f" * 129), "fingerprint"),
    ],
)
def test_malformed_headers(bad, name):
    with pytest.raises(InvalidArgument, match=f"^{name} "):
        Assembly().check(bad)


def test_parts_out_of_order():
    assembly = Assembly()
    with pytest.raises(InvalidArgument, match="before a header"):
        assembly.feed(b"x")
    assembly.open(offer(5), keep=True)
    with pytest.raises(InvalidArgument, match="ahead of it"):
        assembly.check(offer(5))
    with pytest.raises(InvalidArgument, match="before the chunk is whole"):
        assembly.end()


@pytest.mark.parametrize("data", [b"", b"123456", bytes(MAX_FRAME_BYTES + 1)])
def test_frames_of_a_wrong_size(data):
    assembly = Assembly()
    assembly.open(offer(5), keep=True)
    with pytest.raises(InvalidArgument, match=r"^data "):
        assembly.feed(data)
