"""Whether chunks travel raw or encoded, and what coding was measured to take."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.scheduling.coding import CodingSpeed
from kvmesh.scheduling.publishing import Chunk, Links, Load, Publishing
from kvmesh.types import Readers

RAW, ELEMENTS = 6_000_000, 3_000_000
CODECS = ("raw", "int8", "small")
RATES = st.none() | st.floats(1.0, 1e12)


def choices(chunks, store=None, readers=Readers(), remote=True, encode=0.02, decode=0.02, spare=0.0):
    """By a worker whose int8 codes ten times as fast as the small codec, which takes a tenth and is read by half."""
    policy, encoding, decoding, load = Publishing(), CodingSpeed(), CodingSpeed(), Load()
    for name, stored, read, effort in (("int8", 0.5, 0.5, 0.1), ("small", 0.1, 0.05, 1.0)):
        policy.observe(name, RAW, int(stored * RAW), int(read * RAW))
        encoding.observe(name, 1, ELEMENTS, effort * encode)
        decoding.observe(name, 1, ELEMENTS, effort * decode)
    links, chunk = Links(remote, store, readers), Chunk(RAW, ELEMENTS, spare)
    return [CODECS[policy.choose(CODECS, chunk, links, (encoding, decoding), load)] for _ in range(chunks)], load


def chosen(*args, **kwargs):
    """For the first chunk of a prompt."""
    return choices(1, *args, **kwargs)[0][0]


def test_where_link_and_decoder_are_slow_chunks_take_turns_and_both_are_busy():
    """Small: 3 ms on the link, 50 ms to decode; int8: 30 ms and 5 ms."""
    codecs, load = choices(20, remote=False, readers=Readers(True, 1e8), decode=0.05)
    assert {"int8", "small"} == set(codecs)
    assert max(load.steps[-2:]) < 20 * 0.024
    assert min(20 * 0.03, 20 * 0.05) / max(load.steps[-2:]) > 1.2


SMOLLM2 = {"int8": (0.508, 0.0075), "cachegen": (0.162, 0.02), "transform": (0.0166, 0.075)}
"""Share of the raw bytes, and seconds that a core decodes a chunk of 256 tokens, two quality layers of transform."""


def steps_of(names, bytes_per_second):
    """The codecs of 4,096 tokens stored long ago, for a reader of two cores; and how long the busiest step takes."""
    policy, encoding, decoding, load = Publishing(), CodingSpeed(2), CodingSpeed(2), Load()
    for name, (share, seconds) in SMOLLM2.items():
        policy.observe(name, RAW, int(share * RAW), int(share * RAW))
        decoding.observe(name, 1, ELEMENTS, seconds)
    links, chunk = Links(True, None, Readers(True, bytes_per_second)), Chunk(RAW, ELEMENTS, 60.0)
    codecs = [names[policy.choose(names, chunk, links, (encoding, decoding), load)] for _ in range(16)]
    return codecs, max(load.steps[-2:])


def test_over_100_mbit_a_third_of_the_chunks_is_cachegen_and_the_others_transform():
    codecs, seconds = steps_of(("raw", *SMOLLM2), 100e6 / 8)
    assert set(codecs) == {"cachegen", "transform"}
    assert 4 <= codecs.count("cachegen") <= 7
    assert seconds < 0.5
    assert set(codecs[:3]) == {"cachegen", "transform"}


@given(mbit=st.floats(5, 2_000))
def test_the_mix_keeps_its_busiest_step_hardly_longer_busy_than_any_one_codec(mbit):
    _, seconds = steps_of(("raw", *SMOLLM2), mbit * 1e6 / 8)
    for share, decode in ((1.0, 0.0), *SMOLLM2.values()):
        assert seconds <= 1.06 * 16 * max(share * RAW / (mbit * 1e6 / 8), decode / 2) + 0.03


@given(store=RATES, rate=st.floats(0, 1e12), encode=st.floats(0, 10), decode=st.floats(0, 10))
def test_on_one_host_kv_is_never_lossy_however_slow_things_seem(store, rate, encode, decode):
    assert chosen(store, Readers(False, rate), remote=False, encode=encode, decode=decode) == "raw"


def test_the_slower_the_link_the_smaller_the_codec():
    assert chosen(store=1e7) == "small"
    assert chosen(store=2e8) == "int8"
    assert chosen(store=1e11) == "raw"
    assert chosen(store=1e11, readers=Readers(True, 1e7)) == "small"


def test_a_store_beside_the_publisher_counts_for_nothing_where_readers_are_far():
    assert chosen(store=1.0, remote=False, readers=Readers(True, 1e7)) == "small"
    assert chosen(store=1.0, remote=False, readers=Readers(True, 1e11)) == "raw"


def test_what_readers_fetch_counts_and_not_what_is_stored_beside_it():
    slow_reader = Readers(True, 5e6)
    assert chosen(store=1e9, readers=slow_reader, decode=0.05) == "small"
    assert chosen(store=1.2e7, readers=slow_reader, encode=0.5) == "small"


def test_what_is_put_while_the_next_chunk_is_computed_does_not_hold_up_readers():
    """The way to the store takes as long for both codecs' bytes as computing, but readers have a slow link."""
    assert chosen(store=1e7, readers=Readers(True, 1e7), spare=1.0) == "small"
    assert chosen(store=1e7, readers=Readers(True, 1e10), decode=0.05, spare=1.0) == "raw"
    assert chosen(store=1e7, readers=Readers(True, 1e10), decode=0.05) == "small"


def test_encoding_that_the_computing_hides_costs_nothing():
    assert chosen(store=1e7, encode=2.0) == "int8"
    assert chosen(store=1e7, encode=2.0, spare=2.0) == "small"


def test_links_of_which_nothing_is_known_are_taken_for_slow():
    assert chosen(readers=Readers(True)) == "small"
    assert chosen(store=1e11, remote=False, readers=Readers(True)) == "small"
    assert chosen(store=1e11, readers=Readers(True)) == "raw"


@given(slow=st.floats(1e3, 1e11), factor=st.floats(1, 100), encode=st.floats(0, 1), decode=st.floats(0, 1))
def test_a_faster_link_never_gets_a_smaller_codec(slow, factor, encode, decode):
    codecs = [chosen(rate, encode=encode, decode=decode) for rate in (slow, slow * factor)]
    assert CODECS.index(codecs[0]) >= CODECS.index(codecs[1])


def test_coding_is_known_by_its_nearest_quality_and_shared_by_the_pool():
    speed = CodingSpeed(width=2)
    assert speed.seconds("transform", 1, 1000) == 0
    speed.observe("transform", 1, 1000, 1.0)
    speed.observe("transform", 4, 1000, 4.0)
    speed.observe("cachegen", 1, 1000, 9.0)
    assert speed.seconds("transform", 1, 1000) == 0.5
    assert speed.seconds("transform", 2, 1000) == 1.0
    assert speed.seconds("transform", 3, 1000) == 2.0
    assert speed.seconds("transform", 8, 2000) == 8.0
    for _ in range(30):
        speed.observe("transform", 1, 1000, 2.0)
    assert speed.seconds("transform", 1, 1000) == pytest.approx(1.0, rel=0.01)
