"""The books against a simple model, whatever the order of calls; and the policies, one by one."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvmesh.errors import InvalidArgument, NotFound, Overloaded
from kvmesh_kvstore.chunks import Entry, Offer, Tier, Traits
from kvmesh_kvstore.eviction import Demote, Evict, Place
from kvmesh_kvstore.integrity import problems
from kvmesh_kvstore.leases import LeaseTable
from kvmesh_kvstore.store import ChunkStore

KEYS = [bytes([i]) * 32 for i in range(1, 9)]
LEASES = ["a", "b", "c"]
TENANTS = [b"", b"t" * 16]


def traits(offer: Offer) -> Traits:
    return Traits(1, 2 * offer.size, (offer.size,))


def put(store: ChunkStore, offer: Offer, lease_id: str | None = None, now: float = 0.0) -> list[bytes] | None:
    """What the vault does, without the blobs: the keys evicted, or None if there is no room."""
    evicted: list[bytes] = []
    if store.exists(offer, lease_id, now):
        return evicted
    while decision := store.place(offer):
        match decision:
            case Place(tier):
                store.insert(store.draft(offer, traits(offer), tier, lease_id), lease_id, now)
                return evicted
            case Demote(entry):
                store.move(entry, Tier.DISK)
            case Evict(entry):
                evicted.append(entry.key)
                assert store.evict(entry)
    return None


def chunk(i: int, parent: int | None = None, size: int = 10, tail: bool = False, tenant: bytes = b"") -> Offer:
    return Offer(KEYS[i], "f", size, b"" if parent is None else KEYS[parent], tail, tenant)


class Books(RuleBasedStateMachine):
    """The model: leases with their ends, and for each chunk its offer, owner and pins."""

    @initialize(
        memory=st.sampled_from([0, 30, 60]), disk=st.sampled_from([0, 20, 50]), quota=st.sampled_from([None, 25, 40])
    )
    def start(self, memory, disk, quota):
        self.store = ChunkStore(memory, disk, LeaseTable(max_leases=2, max_ttl=5.0), quota)
        self.now = 0.0
        self.leases: dict[str, float] = {}
        self.chunks: dict[bytes, tuple[Offer, str | None, set[str]]] = {}

    def live(self, lease_id):
        return lease_id is None or self.leases.get(lease_id, 0) > self.now

    @rule(lease_id=st.sampled_from(LEASES), ttl=st.sampled_from([1.0, 3.0, 100.0]))
    def acquire(self, lease_id, ttl):
        if lease_id not in self.leases and len(self.leases) == 2:
            with pytest.raises(Overloaded):
                self.store.leases.acquire(lease_id, ttl, self.now)
            return
        assert self.store.leases.acquire(lease_id, ttl, self.now) == min(ttl, 5.0)
        self.leases[lease_id] = max(self.leases.get(lease_id, 0), self.now + min(ttl, 5.0))

    @rule(lease_id=st.sampled_from(LEASES))
    def renew(self, lease_id):
        if not self.live(lease_id):
            with pytest.raises(NotFound):
                self.store.leases.renew(lease_id, 2.0, self.now)
            return
        self.store.leases.renew(lease_id, 2.0, self.now)
        self.leases[lease_id] = max(self.leases[lease_id], self.now + 2.0)

    @rule(lease_id=st.sampled_from(LEASES))
    def release(self, lease_id):
        dropped = self.store.release(lease_id)
        assert (dropped is not None) == (lease_id in self.leases)
        assert {entry.key for entry in dropped or ()} == self.forget_lease(lease_id)

    @rule(seconds=st.sampled_from([0.5, 2.0, 6.0]))
    def wait(self, seconds):
        self.now += seconds
        late = [lease_id for lease_id, end in self.leases.items() if end <= self.now]
        expected = set().union(*(self.forget_lease(lease_id) for lease_id in late))
        assert {entry.key for entry in self.store.expire(self.now)} == expected

    @rule(seconds=st.sampled_from([0.5, 2.0]))
    def wait_without_a_sweep(self, seconds):
        self.now += seconds

    @rule(
        i=st.integers(0, 7),
        parent=st.none() | st.integers(0, 7),
        size=st.sampled_from([5, 10, 25, 55, 70]),
        tail=st.booleans(),
        lease_id=st.none() | st.sampled_from(LEASES),
        tenant=st.sampled_from(TENANTS),
    )
    def put(self, i, parent, size, tail, lease_id, tenant):
        offer = chunk(i, parent if parent != i else None, size, tail, tenant)
        if not self.live(lease_id) or (tail and lease_id is None):
            with pytest.raises(NotFound if lease_id else InvalidArgument):
                put(self.store, offer, lease_id, self.now)
            return
        known = offer.key in self.chunks
        if not known and self.closes_a_ring(offer):
            with pytest.raises(InvalidArgument, match="parent_key"):
                put(self.store, offer, lease_id, self.now)
            return
        evicted = put(self.store, offer, lease_id, self.now)
        if evicted is None:
            self.check_nothing_more_could_go(size)
            return
        for key in evicted:
            self.check_evictable(key)
            del self.chunks[key]
        if not known:
            self.chunks[offer.key] = (offer, lease_id if tail else None, set())
        if lease_id:
            self.chunks[offer.key][2].add(lease_id)

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=5), lease_id=st.none() | st.sampled_from(LEASES))
    def find(self, keys, lease_id):
        if not self.live(lease_id):
            with pytest.raises(NotFound):
                self.store.find_missing(keys, lease_id, self.now)
            return
        assert self.store.find_missing(keys, lease_id, self.now) == [key for key in keys if key not in self.chunks]
        for key in keys:
            if lease_id and key in self.chunks:
                self.chunks[key][2].add(lease_id)

    @rule(key=st.sampled_from(KEYS))
    def read_damaged(self, key):
        entry = self.store.get(key)
        assert (entry is not None) == (key in self.chunks)
        if entry is not None:
            assert self.store.remove(entry)
            assert not self.store.remove(entry)
            del self.chunks[key]

    @rule(key=st.sampled_from(KEYS))
    def promote(self, key):
        entry = self.store.get(key)
        decision = self.store.promotion(entry) if entry else None
        if isinstance(decision, Demote):
            assert not decision.entry.pins
            self.store.move(decision.entry, Tier.DISK)
        if decision:
            self.store.move(entry, Tier.MEMORY)

    @invariant()
    def books_are_right(self):
        assert problems(self.store) == []
        assert {key: entry.pins for key, entry in self.store._entries.items()} == {
            key: pins for key, (_, _, pins) in self.chunks.items()
        }
        assert set(self.store.shared_keys()) == {key for key, (_, owner, _) in self.chunks.items() if owner is None}

    def forget_lease(self, lease_id):
        self.leases.pop(lease_id, None)
        tails = {key for key, (_, owner, _) in self.chunks.items() if owner == lease_id}
        for key in tails:
            del self.chunks[key]
        for _, _, pins in self.chunks.values():
            pins.discard(lease_id)
        return tails

    def closes_a_ring(self, offer):
        ancestor = offer.parent
        while ancestor in self.chunks and self.chunks[ancestor][0].tenant == offer.tenant:
            ancestor = self.chunks[ancestor][0].parent
        return ancestor == offer.key

    def check_evictable(self, key):
        victim, _, pins = self.chunks[key]
        assert not pins
        assert all((victim.tenant, key) != offer.continues for offer, _, _ in self.chunks.values())

    def check_nothing_more_could_go(self, size):
        """FULL: too large for any tier, or everything that could go would not help."""
        remaining = {entry.key: entry for entry in self.store._entries.values()}
        for key in set(self.chunks) - set(remaining):
            del self.chunks[key]
        if self.store.could_ever_place(chunk(0, size=size)):
            assert any(entry.pins for entry in remaining.values())


Books.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestBooks = Books.TestCase


def test_a_prefix_outlives_its_continuations():
    store = ChunkStore(30)
    for offer in (chunk(0), chunk(1, 0), chunk(2, 1)):
        put(store, offer)
    assert put(store, chunk(3)) == [KEYS[2]]
    assert put(store, chunk(4, 0)) == [KEYS[1]]
    assert put(store, chunk(5)) == [KEYS[3]]
    assert put(store, chunk(6)) == [KEYS[4]]


def test_the_least_recently_used_leaf_goes_first():
    store = ChunkStore(30)
    for i in range(3):
        put(store, chunk(i))
    store.get(KEYS[0])
    assert put(store, chunk(3)) == [KEYS[1]]
    store.get(KEYS[2])
    assert put(store, chunk(4)) == [KEYS[0]]


def test_leased_chunks_stay_and_a_store_full_of_them_says_so():
    store = ChunkStore(20)
    store.leases.acquire("a", 10.0, 0.0)
    assert put(store, chunk(0), "a") == []
    assert put(store, chunk(1), "a") == []
    assert put(store, chunk(2)) is None
    store.release("a")
    assert put(store, chunk(2)) == [KEYS[0]]


def test_a_chunk_that_is_being_read_stays():
    store = ChunkStore(10)
    put(store, chunk(0))
    entry = store.get(KEYS[0])
    entry.readers += 1
    assert put(store, chunk(1)) is None
    entry.readers -= 1
    assert put(store, chunk(1)) == [KEYS[0]]


def test_memory_steps_down_to_disk_unpinned_first_and_loses_nothing():
    store = ChunkStore(20, 40)
    store.leases.acquire("a", 10.0, 0.0)
    put(store, chunk(0), "a")
    for i in (1, 2, 3):
        assert put(store, chunk(i)) == []
    assert store.get(KEYS[0]).tier is Tier.MEMORY
    assert store.get(KEYS[1]).tier is Tier.DISK
    assert len(store) == 4


def test_too_large_for_memory_goes_to_disk_and_too_large_for_both_nowhere():
    store = ChunkStore(10, 40)
    assert put(store, chunk(0, size=30)) == []
    assert store.get(KEYS[0]).tier is Tier.DISK
    assert put(store, chunk(1, size=41)) is None


def test_a_promotion_swaps_with_an_older_unpinned_chunk_or_does_not_happen():
    store = ChunkStore(20, 20)
    for i in range(4):
        put(store, chunk(i))
    entry = store.get(KEYS[0])
    assert store.promotion(entry) == Demote(store.get(KEYS[2]))
    store.leases.acquire("a", 10.0, 0.0)
    store.find_missing([KEYS[2], KEYS[3]], "a", 0.0)
    assert store.promotion(entry) is None


def test_pins_end_with_an_expired_lease_even_before_the_sweep():
    store = ChunkStore(10)
    store.leases.acquire("a", 1.0, 0.0)
    with pytest.raises(NotFound):
        put(store, chunk(0), "a", now=1.0)
    with pytest.raises(NotFound):
        store.find_missing([], "a", 1.0)


def test_a_tail_needs_a_lease_and_goes_with_it():
    store = ChunkStore(30)
    with pytest.raises(InvalidArgument, match="lease_id"):
        put(store, chunk(0, tail=True))
    store.leases.acquire("a", 1.0, 0.0)
    put(store, chunk(0), "a")
    put(store, chunk(1, 0, tail=True), "a")
    assert [entry.key for entry in store.expire(1.0)] == [KEYS[1]]
    assert store.find_missing(KEYS[:2], None, 1.0) == [KEYS[1]]


def test_a_key_belongs_to_one_namespace():
    store = ChunkStore(30)
    put(store, chunk(0))
    with pytest.raises(InvalidArgument, match="fingerprint"):
        put(store, Offer(KEYS[0], "other", 10))


def test_what_is_restored_beyond_the_budget_goes_leaf_first():
    store = ChunkStore(10, 20)
    for i, offer in enumerate((chunk(0), chunk(1, 0), chunk(2))):
        assert store.restore(Entry(offer, traits(offer), i, Tier.DISK))
    assert not store.restore(Entry(chunk(0), traits(chunk(0)), 9, Tier.DISK))
    surplus = store.excess()
    assert surplus.key == KEYS[1]
    store.remove(surplus)
    assert store.excess() is None
    assert store.draft(chunk(3), traits(chunk(3)), Tier.DISK, None).serial == 10


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda s: s.memory.trial.popitem(), "exactly one tier"),
        (lambda s: setattr(s.memory, "used", 3), "bytes in the books"),
        (lambda s: setattr(s.memory, "budget", 3), "more than the budget"),
        (lambda s: s.get(KEYS[0]).pins.add("ghost"), "other leases"),
        (lambda s: s.leases["a"].pins.add(KEYS[5]), "not here"),
        (lambda s: s.children.clear(), "children"),
        (lambda s: setattr(s.get(KEYS[1]), "owner", None), "no lease owns"),
        (lambda s: setattr(s.get(KEYS[0]), "readers", -1), "readers"),
    ],
)
def test_the_integrity_check_sees_damage(damage, says):
    store = ChunkStore(40)
    store.leases.acquire("a", 1.0, 0.0)
    put(store, chunk(0))
    put(store, chunk(1, 0, tail=True), "a")
    assert problems(store) == []
    damage(store)
    assert any(says in error for error in problems(store))
