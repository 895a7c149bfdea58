"""Keys agree between processes, never between namespaces, prompts or leases; tickets cover a prompt without gaps."""

import subprocess
import sys
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from kvmesh.kv.keys import chain, fingerprint, namespace_root, tail_key, tenant_of
from kvmesh.kv.ticket import candidates, owners, parent_of, ranking, rendezvous, write_ticket
from kvmesh.types import CHUNK_TOKENS, TENANT_BYTES, ChunkSource

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=3 * CHUNK_TOKENS)
SOURCES = [ChunkSource(f"store-{i}", f"127.0.0.1:{i}") for i in range(1, 6)]


def ticket(tokens, sources=SOURCES, lease_id="lease", salt=""):
    return write_ticket(
        fingerprint="f", salt=salt, tokens=tokens, layers=(0, 2), sources=sources, lease_id=lease_id, ttl_ms=1000
    )


def test_keys_are_the_same_in_every_process_and_version():
    root = namespace_root("fingerprint", "salt")
    code = (
        "from kvmesh.kv.keys import *; r = namespace_root('fingerprint', 'salt');"
        "print(chain(r, list(range(32)), 16)[-1].hex(), tail_key(r, [1], 'l').hex())"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)}
    ).stdout.split()
    assert other == [chain(root, range(32), 16)[-1].hex(), tail_key(root, [1], "l").hex()]


def test_a_fingerprint_does_not_depend_on_order_but_on_every_item():
    layout = {"model": "m", "dtype": "float32"}
    assert fingerprint(layout) == fingerprint(dict(reversed(layout.items())))
    assert len({fingerprint(x) for x in (layout, {**layout, "dtype": "float16"}, {**layout, "x": ""}, {})}) == 4


def test_namespaces_do_not_run_into_each_other():
    assert namespace_root("ab", "c") != namespace_root("a", "bc")


@given(TOKENS, st.integers(1, 300))
def test_a_chain_extends_and_depends_on_all_before(tokens, step):
    root = namespace_root("f", "")
    keys = chain(root, tokens, step)
    assert len(keys) == len(tokens) // step
    assert len(set(keys)) == len(keys)
    assert chain(root, tokens[: len(keys) * step // 2], step) == keys[: len(keys) * step // 2 // step]
    if keys:
        other = [tokens[0] ^ 1, *tokens[1:]]
        assert not set(chain(root, other, step)) & set(keys)


@given(TOKENS)
def test_a_ticket_covers_the_prompt_without_gaps(tokens):
    written = ticket(tokens)
    ends = [0, *(chunk.end for chunk in written.chunks)]
    assert [chunk.start for chunk in written.chunks] == ends[:-1]
    assert ends[-1] == len(tokens)
    assert [chunk.tail for chunk in written.chunks[:-1]] == [False] * (len(written.chunks) - 1 if tokens else 0)
    assert [parent_of(written, i) for i in range(len(written.chunks))] == [b"", *(c.key for c in written.chunks)][:-1]
    assert all((chunk.first_layer, chunk.end_layer) == (0, 2) for chunk in written.chunks)


def test_tails_belong_to_a_lease_and_full_chunks_to_all():
    tokens = range(CHUNK_TOKENS + 3)
    mine, yours = ticket(tokens), ticket(tokens, lease_id="other")
    assert mine.chunks[0].key == yours.chunks[0].key
    assert mine.chunks[1].key != yours.chunks[1].key
    assert ticket(tokens, salt="tenant").chunks[0].key != mine.chunks[0].key


def test_without_sources_a_ticket_names_no_chunk():
    assert ticket(range(600), sources=[]).chunks == ()


NAMES = st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=8, unique=True)
KEY = st.binary(min_size=32, max_size=32)


@given(KEY, st.permutations(SOURCES))
def test_placement_ignores_the_order_of_sources(key, shuffled):
    assert [shuffled[i] for i in ranking(key, shuffled)] == [SOURCES[i] for i in ranking(key, SOURCES)]
    assert ranking(key, shuffled)[0] == rendezvous(key, shuffled)


@given(KEY, NAMES)
def test_who_joins_takes_only_what_it_wins_and_the_others_keep_their_order(key, names):
    *old, newcomer = [ChunkSource(name, "") for name in names]
    before = [old[i] for i in ranking(key, old)]
    after = [[*old, newcomer][i] for i in ranking(key, [*old, newcomer])]
    assert [source for source in after if source != newcomer] == before


@given(NAMES, st.integers(1, 4))
def test_after_a_join_readers_find_every_chunk_where_it_was_put(names, replicas):
    *old, _ = sources = [ChunkSource(name, "") for name in names]
    before, after = (replace(ticket(range(600), sources=group), replicas=replicas) for group in (old, sources))
    for then, now in zip(before.chunks, after.chunks, strict=True):
        put_at = set(owners(before, then))
        assert put_at <= set(candidates(after, now))
        assert put_at - set(owners(after, now)) == set() or len(sources) - 1 in owners(after, now)


def test_a_joining_source_takes_about_its_share():
    old, new = (ticket(range(600 * CHUNK_TOKENS), sources=SOURCES[:n]) for n in (4, 5))
    moved = sum(a.source != b.source for a, b in zip(old.chunks, new.chunks, strict=True))
    assert abs(moved - 600 / 5) < 60


def test_a_tenants_name_tells_salts_apart_and_does_not_tell_the_salt():
    assert tenant_of("") == b""
    assert len({tenant_of(salt) for salt in ("a", "b", "ab", "a\0")}) == 4
    assert ticket(range(600), salt="a").tenant == tenant_of("a")
    assert all(len(tenant_of(salt)) == TENANT_BYTES for salt in ("a", "x" * 999))


def test_placement_is_even():
    counts = [0] * len(SOURCES)
    for chunk in ticket(range(1000 * CHUNK_TOKENS)).chunks:
        counts[chunk.source] += 1
    assert min(counts) > 140
