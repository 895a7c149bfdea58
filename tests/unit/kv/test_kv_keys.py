"""Keys agree between processes, never between namespaces, prompts or leases; tickets cover a prompt without gaps."""

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from kvmesh.kv.keys import chain, fingerprint, namespace_root, tail_key
from kvmesh.kv.ticket import parent_of, rendezvous, write_ticket
from kvmesh.types import CHUNK_TOKENS, ChunkSource

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


@given(st.binary(min_size=32, max_size=32), st.permutations(SOURCES))
def test_placement_ignores_order_and_only_moves_what_it_must(key, shuffled):
    chosen = SOURCES[rendezvous(key, SOURCES)]
    assert shuffled[rendezvous(key, shuffled)] == chosen
    fewer = [source for source in SOURCES if source != SOURCES[0]]
    assert chosen == SOURCES[0] or fewer[rendezvous(key, fewer)] == chosen


def test_placement_is_even():
    counts = [0] * len(SOURCES)
    for chunk in ticket(range(1000 * CHUNK_TOKENS)).chunks:
        counts[chunk.source] += 1
    assert min(counts) > 140
