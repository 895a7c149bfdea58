"""Whether the books of a store agree with each other. Pure; the blobs are the vault's to compare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from kvmesh_kvstore.chunks import Entry
from kvmesh_kvstore.shelves import Shelf
from kvmesh_kvstore.store import ChunkStore


def problems(store: ChunkStore) -> list[str]:
    """What is wrong; empty is good."""
    entries = list(store)
    return [
        *_shelf_problems(store, entries),
        *_lease_problems(store, entries),
        *_account_problems(store, entries),
        *(problem for entry in entries for problem in _entry_problems(store, entry)),
    ]


def _shelf_problems(store: ChunkStore, entries: list[Entry]) -> Iterator[str]:
    for shelf in store.shelves:
        if shelf.used != sum(entry.size for entry in shelf):
            yield f"{shelf.tier}: {shelf.used} bytes in the books are not those of its chunks"
        if shelf.used > shelf.budget:
            yield f"{shelf.tier}: {shelf.used} bytes are more than the budget of {shelf.budget}"
        if misfiled := _misfiled(shelf):
            yield f"{shelf.tier}: {misfiled} chunks are in the wrong queue"
    if len(entries) != sum(map(len, store.shelves)):
        yield "some chunk is not in exactly one tier"


def _misfiled(shelf: Shelf) -> int:
    return sum(entry.hot for entry in shelf.trial.values()) + sum(not entry.hot for entry in shelf.main.values())


def _lease_problems(store: ChunkStore, entries: list[Entry]) -> Iterator[str]:
    holders, keys = store.leases.holders(), {entry.key for entry in entries}
    if stray := holders.keys() - keys:
        yield f"leases pin {len(stray)} chunks that are not here"
    for entry in entries:
        if entry.pins != holders.get(entry.key, set()):
            yield f"{_name(entry)} is pinned by other leases than say so"


def _account_problems(store: ChunkStore, entries: list[Entry]) -> Iterator[str]:
    used: Counter[bytes] = Counter()
    for entry in entries:
        used[entry.offer.tenant] += entry.size
    if {tenant: account.used for tenant, account in store.accounts} != used:
        yield "the tenants' accounts are not those of their chunks"
    if (quota := store.accounts.quota) is not None and any(bytes_ > quota for bytes_ in used.values()):
        yield f"some tenant has more than its quota of {quota} bytes"
    if store.children != Counter(entry.offer.continues for entry in entries):
        yield "children counts are not those of the chunks"
    if store.qualities != Counter(entry.traits.quality for entry in entries):
        yield "the counts of qualities are not those of the chunks"
    if store.raw_bytes != sum(entry.traits.raw_bytes for entry in entries):
        yield f"{store.raw_bytes} raw bytes in the books are not those of the chunks"


def _entry_problems(store: ChunkStore, entry: Entry) -> Iterator[str]:
    if entry not in store.shelf(entry.tier):
        yield f"{_name(entry)} is not in {entry.tier}"
    if entry.offer.tail != (entry.owner is not None) or (entry.owner and entry.owner not in entry.pins):
        yield f"{_name(entry)} is a tail that no lease owns"
    if entry.readers < 0:
        yield f"{_name(entry)} has {entry.readers} readers"


def _name(entry: Entry) -> str:
    return entry.key.hex()[:12]
