"""The prefix index: matches are leading, bounded, and end with the worker's life."""

from hypothesis import given
from hypothesis import strategies as st

from kvmesh.scheduling.prefix_index import PrefixIndex, prefix_hashes


def test_hashes_cover_full_blocks_only_and_chain():
    assert prefix_hashes(range(15)) == []
    assert len(prefix_hashes(range(40))) == 2
    assert prefix_hashes(range(40))[0] == prefix_hashes(range(16))[0]
    assert prefix_hashes([1] * 16 + [2] * 16)[1] != prefix_hashes([3] * 16 + [2] * 16)[1]
    assert prefix_hashes(range(16), salt="a") != prefix_hashes(range(16), salt="b")


@given(st.lists(st.integers(0, 1), max_size=80), st.lists(st.integers(0, 1), max_size=80))
def test_match_is_the_common_prefix_in_blocks(sent, asked):
    index = PrefixIndex()
    index.record("w", 1, prefix_hashes(sent, step=4))
    common = next((i for i, (a, b) in enumerate(zip(sent, asked, strict=False)) if a != b), min(len(sent), len(asked)))
    assert index.match("w", 1, prefix_hashes(asked, step=4)) == common // 4


def test_the_least_recently_used_leaf_goes_first():
    index = PrefixIndex(capacity=4)
    old, new = prefix_hashes(range(48)), prefix_hashes(range(100, 132))
    index.record("w", 1, old)
    index.record("w", 1, new)
    assert len(index) == 4
    assert index.match("w", 1, old) == 2
    assert index.match("w", 1, new) == 2


def test_a_new_epoch_knows_nothing():
    index, hashes = PrefixIndex(), prefix_hashes(range(32))
    index.record("w", 1, hashes)
    assert index.match("w", 2, hashes) == 0
    index.record("w", 2, hashes[:1])
    assert index.match("w", 2, hashes) == 1
    index.forget("w")
    index.forget("w")
    assert index.match("w", 2, hashes) == 0
