"""Who stays when room is short: what is wanted again, what is leased, and what is another's."""

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh_kvstore.chunks import Offer, Tier, Traits
from kvmesh_kvstore.config import KvStoreConfig
from kvmesh_kvstore.eviction import Demote, Evict, Place
from kvmesh_kvstore.integrity import problems
from kvmesh_kvstore.shelves import TRIAL_SHARE, Ghosts
from kvmesh_kvstore.store import ChunkStore

A, B, C = (name * 16 for name in (b"a", b"b", b"c"))


def key(i: int) -> bytes:
    return i.to_bytes(32, "big")


def offer(i: int, parent: int | None = None, size: int = 1, tenant: bytes = b"") -> Offer:
    return Offer(key(i), "f", size, b"" if parent is None else key(parent), tenant=tenant)


def put(store: ChunkStore, chunk: Offer, lease_id: str | None = None) -> list[Offer] | None:
    """What was evicted for it; None if there is no room."""
    evicted: list[Offer] = []
    if store.exists(chunk, lease_id, 0.0):
        return evicted
    while decision := store.place(chunk):
        match decision:
            case Place(tier):
                store.insert(store.draft(chunk, Traits(1, 4, (chunk.size,)), tier, lease_id), lease_id, 0.0)
                return evicted
            case Demote(entry):
                store.move(entry, Tier.DISK)
            case Evict(entry):
                assert not entry.pins
                evicted.append(entry.offer)
                assert store.evict(entry)
    return None


def ask(store: ChunkStore, *chunks: int) -> list[bytes]:
    """As another request would."""
    return store.find_missing([key(i) for i in chunks], None, 0.0)


# Admission


@pytest.mark.parametrize("disk", [0, 100])
def test_a_scan_of_chunks_seen_once_leaves_what_is_wanted(disk):
    store = ChunkStore(100, disk)
    hot = range(80)
    for i in hot:
        put(store, offer(i, i - 1 if i % 8 else None))
    assert ask(store, *hot) == []
    for i in range(1000, 3000):
        assert put(store, offer(i)) is not None
    assert ask(store, *hot) == []
    assert problems(store) == []


def test_those_on_trial_get_no_more_room_than_their_share_once_the_rest_is_wanted():
    store = ChunkStore(200)
    for i in range(200):
        put(store, offer(i))
    ask(store, *range(200))
    for i in range(1000, 1500):
        put(store, offer(i))
    assert len(store.memory.trial) == TRIAL_SHARE * 200 + 1


def test_a_lease_that_put_a_chunk_is_no_second_request():
    store = ChunkStore(10)
    for lease_id in ("a", "b"):
        store.leases.acquire(lease_id, 10.0, 0.0)
    put(store, offer(0), "a")
    store.find_missing([key(0)], "a", 0.0)
    store.get(key(0))
    assert not store.peek(key(0)).hot
    store.find_missing([key(0)], "b", 0.0)
    assert store.peek(key(0)).hot


def test_who_comes_back_soon_after_eviction_is_no_stranger():
    store = ChunkStore(10)
    for i in range(20):
        put(store, offer(i))
    put(store, offer(0))
    put(store, offer(99))
    assert [store.peek(key(i)).hot for i in (0, 99)] == [True, False]


@given(st.lists(st.integers(0, 20)), st.integers(1, 8))
def test_ghosts_are_the_last_that_left(keys, capacity):
    ghosts = Ghosts(capacity)
    for i in keys:
        ghosts.add(key(i))
    last = list(dict.fromkeys(reversed(keys)))[:capacity]
    assert {i for i in range(21) if ghosts.take(key(i))} == set(last)
    assert not any(ghosts.take(key(i)) for i in range(21))


def test_more_hits_than_lru_on_a_skewed_trace_with_scans():
    random = np.random.default_rng(7)
    wanted = [int(i) for i in random.zipf(1.2, 20_000) if i < 2000]
    trace = [each for n, i in enumerate(wanted) for each in ((i,) if n % 4 else (i, 10_000 + n))]
    store, lru = ChunkStore(100), OrderedDict[int, None]()
    ours = theirs = 0
    for i in trace:
        if ask(store, i):
            put(store, offer(i))
        else:
            ours += 1
        theirs += i in lru
        lru[i] = None
        lru.move_to_end(i)
        if len(lru) > 100:
            lru.popitem(last=False)
    assert ours > 1.03 * theirs


# Tenants


@given(
    st.lists(st.tuples(st.sampled_from([A, B, C]), st.integers(0, 60), st.integers(1, 9), st.booleans()), max_size=80),
    st.sampled_from([(90, 0), (60, 30), (0, 90)]),
)
def test_while_quotas_fit_nobody_is_evicted_for_another(puts, budgets):
    # Sizes up to 9 and quotas of 20: three tenants and what a tier cannot fill fit into 90.
    store = ChunkStore(*budgets, quota=20)
    store.leases.acquire("lease", 10.0, 0.0)
    for tenant, i, size, leased in puts:
        chunk = offer(i + 100 * tenant[0], size=size, tenant=tenant)
        evicted = put(store, chunk, "lease" if leased else None)
        assert {each.tenant for each in evicted or ()} <= {tenant}
        assert problems(store) == []
        if evicted is None:
            assert all(entry.pins for entry in store.accounts.of(tenant))


@given(st.lists(st.integers(1, 5), min_size=30, max_size=120), st.integers(1, 6), st.booleans())
def test_a_flood_takes_nothing_from_one_who_has_less(flood, small, hot):
    """Here quotas promise more than there is: whoever has most gives first."""
    store = ChunkStore(40, quota=35)
    for i in range(small):
        put(store, offer(i, tenant=A))
    if hot:
        ask(store, *range(small))
    for i, size in enumerate(flood):
        for evicted in put(store, offer(1000 + i, size=size, tenant=B)) or ():
            assert evicted.tenant == B
    assert ask(store, *range(small)) == []
    assert problems(store) == []


def test_a_tenant_whose_quota_is_leased_is_told_that_it_is_full():
    store = ChunkStore(100, quota=3)
    store.leases.acquire("lease", 10.0, 0.0)
    for i in range(3):
        assert put(store, offer(i, tenant=A), "lease") == []
    assert put(store, offer(9, tenant=A)) is None
    assert put(store, offer(10, tenant=B)) == []
    assert put(store, offer(11, size=4, tenant=B)) is None
    store.release("lease")
    assert [each.key for each in put(store, offer(9, tenant=A))] == [key(0)]


def test_a_strangers_chunk_does_not_keep_mine_from_going():
    store = ChunkStore(100, quota=1)
    put(store, offer(0, tenant=A))
    put(store, offer(1, parent=0, tenant=B))
    assert [each.key for each in put(store, offer(2, tenant=A))] == [key(0)]
    assert problems(store) == []


def test_a_quota_that_shrank_is_kept_after_a_restart():
    store = ChunkStore(0, 10, quota=2)
    for i in range(5):
        chunk = offer(i, i - 1 if i else None, tenant=A)
        store.restore(store.draft(chunk, Traits(1, 4, (1,)), Tier.DISK, None))
    while surplus := store.excess():
        store.remove(surplus)
    assert ask(store, *range(5)) == [key(i) for i in (2, 3, 4)]
    assert problems(store) == []


@pytest.mark.parametrize(("given_", "expected"), [(None, None), (0.25, 50), (1, 200), (1000, 1000)])
def test_a_quota_is_bytes_or_a_share(given_, expected, tmp_path):
    config = KvStoreConfig(memory_bytes=150, disk_bytes=50, disk_path=tmp_path, tenant_quota=given_)
    assert config.quota_bytes == expected


@pytest.mark.parametrize(("given_", "expected"), [(None, None), (0.25, 100), (1, 400), (50, 50)])
def test_the_quota_holds_in_the_remote_tier_too(given_, expected):
    assert KvStoreConfig(blob_bytes=400, tenant_quota=given_).blob_quota_bytes == expected


@pytest.mark.parametrize("url", ["http://x", "redis", "cluster://x"])
def test_the_url_of_the_remote_tier_is_checked(url):
    with pytest.raises(ValueError, match="KVMESH_BLOB_URL"):
        KvStoreConfig(blob_url=url)
