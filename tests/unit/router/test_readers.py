"""What the router tells a prefill worker of those who will read its KV."""

import pytest

from kvmesh.types import ChunkSource, Readers, Role, WorkerInfo
from kvmesh_router.readers import REPLIES, ReaderLinks

STORE = [ChunkSource("kvstore-0", "10.0.0.9:1")]


def worker(name: str, host: str, role: Role = Role.DECODE) -> WorkerInfo:
    return WorkerInfo(name, 1, role, f"{host}:1", 1)


def test_readers_on_the_stores_host_are_not_remote():
    links = ReaderLinks()
    links.retain([worker("a", "10.0.0.9"), worker("p", "10.0.0.1", Role.PREFILL)])
    assert links.of(STORE) == Readers(False, 0.0)


def test_the_slowest_remote_link_counts_and_goes_with_its_worker():
    fast, slow, near = worker("a", "10.0.0.1"), worker("b", "10.0.0.2"), worker("c", "10.0.0.9")
    links = ReaderLinks()
    links.retain([fast, slow, near])
    assert links.of(STORE) == Readers(True, 0.0)
    for reader, rate in ((fast, 1e9), (slow, 1e7), (near, 1.0), (fast, 0.0)):
        links.note(reader, rate)
    assert links.of(STORE) == Readers(True, 1e7)
    links.retain([fast, near])
    assert links.of(STORE) == Readers(True, 1e9)
    links.retain([near])
    assert links.of(STORE) == Readers(False, 0.0)


def test_a_link_that_varies_is_taken_for_slow_at_once_and_for_fast_after_a_while():
    reader, links = worker("a", "10.0.0.1"), ReaderLinks()
    links.retain([reader])
    for rate in (1e9, 1e7):
        links.note(reader, rate)
    for _ in range(REPLIES - 1):
        assert 1e7 < links.of(STORE).bytes_per_second < 1e8
        links.note(reader, 1e9)
    links.note(reader, 1e9)
    assert links.of(STORE).bytes_per_second == pytest.approx(1e9)


def test_one_store_elsewhere_makes_a_reader_remote():
    links = ReaderLinks()
    links.retain([worker("a", "10.0.0.9")])
    assert links.of([*STORE, ChunkSource("kvstore-1", "10.0.0.8:1")]).remote
