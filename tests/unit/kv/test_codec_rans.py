"""rANS: exact, close to Shannon's bound, close to another implementation, and firm against any bytes."""

from contextlib import suppress

import constriction
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.kv.codec import CorruptChunk
from kvmesh.kv.codecs.rans import STATE_BYTES, TOTAL, Tables, decode, encode, quantise


def gaussian_tables(classes: int, symbols: int, seed: int = 0) -> Tables:
    spreads = np.exp(np.random.default_rng(seed).normal(0.5, 0.8, (classes, 1)))
    distance = np.arange(symbols) - symbols // 2
    return Tables(quantise(np.exp(-((distance / spreads) ** 2) / 2) + 1e-9))


def draw(tables: Tables, shape: tuple[int, int, int], seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Symbols distributed as their classes say."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, tables.classes, (shape[0], shape[2])).astype("<u2")
    ends = np.cumsum(tables.frequencies, axis=1)[classes][:, None]
    slots = rng.integers(0, TOTAL, shape)[..., None]
    return (slots >= ends).sum(axis=-1).astype(np.uint8), classes


@given(
    st.integers(1, 3), st.integers(0, 9), st.integers(1, 11), st.integers(1, 5), st.integers(2, 64), st.integers(0, 99)
)
@settings(max_examples=60, deadline=None)
def test_round_trip_of_any_shape(blocks, rows, columns, classes, symbols, seed):
    tables = gaussian_tables(classes, symbols, seed)
    matrix, members = draw(tables, (blocks, rows, columns), seed)
    payload = encode(matrix, members, tables)
    assert (decode(payload, matrix.shape, members, tables) == matrix).all()


@pytest.mark.parametrize("symbols", [2, 16, 64, 256])
def test_the_coder_loses_less_than_half_a_percent(symbols):
    tables = gaussian_tables(16, symbols)
    matrix, classes = draw(tables, (8, 256, 64))
    shannon = tables.bits[classes[:, None], matrix].sum()
    assert 8 * len(encode(matrix, classes, tables)) < 1.005 * shannon


def test_as_small_as_constriction_with_the_same_models():
    tables = gaussian_tables(4, 31)
    matrix, classes = draw(tables, (1, 2000, 4))
    oracle = constriction.stream.stack.AnsCoder()
    for column in range(3, -1, -1):
        shares = tables.frequencies[classes[0, column]].astype(np.float64)
        model = constriction.stream.model.Categorical(shares / TOTAL, perfect=True)
        oracle.encode_reverse(matrix[0, :, column].astype(np.int32), model)
    theirs, ours = oracle.get_compressed().nbytes, len(encode(matrix, classes, tables))
    assert abs(ours - STATE_BYTES - theirs) < 0.005 * theirs


def test_a_certain_symbol_costs_nothing():
    tables = Tables(quantise(np.array([[0.0, 1.0, 0.0]])))
    classes = np.zeros((1, 4), "<u2")
    matrix = np.ones((1, 1000, 4), np.uint8)
    payload = encode(matrix, classes, tables)
    assert len(payload) == STATE_BYTES
    assert (decode(payload, matrix.shape, classes, tables) == 1).all()


def test_an_impossible_symbol_or_class_is_refused():
    tables = Tables(quantise(np.array([[0.0, 1.0, 1.0]])))
    classes = np.zeros((1, 5), "<u2")
    for place in (0, 4):
        matrix = np.ones((1, 3, 5), np.uint8)
        matrix[0, 1, place] = 0
        with pytest.raises(ValueError, match="cannot occur"):
            encode(matrix, classes, tables)
    with pytest.raises(ValueError, match="below 3"):
        encode(np.full((1, 3, 5), 3, np.uint8), classes, tables)
    with pytest.raises(ValueError, match="beyond"):
        encode(np.ones((1, 3, 5), np.uint8), classes + np.uint16(1), tables)


@pytest.mark.parametrize("row", [[TOTAL - 1, 0], [TOTAL, 1]])
def test_tables_must_sum_up(row):
    with pytest.raises(ValueError, match="sum"):
        Tables(np.array([row], "<u2"))


@given(st.lists(st.lists(st.floats(0, 1e12), min_size=5, max_size=5).filter(any), min_size=1, max_size=4))
def test_quantised_weights_keep_what_is_possible_and_only_that(weights):
    frequencies = quantise(np.array(weights))
    assert ((frequencies > 0) == (np.array(weights) > 0)).all()
    Tables(frequencies)


TABLES = gaussian_tables(3, 9)
MATRIX, CLASSES = draw(TABLES, (2, 40, 6))
PAYLOAD = encode(MATRIX, CLASSES, TABLES)


@given(st.data())
@settings(max_examples=500, deadline=None)
def test_mutated_strings_are_refused_or_are_symbols(data):
    mutated = bytearray(PAYLOAD)
    for _ in range(data.draw(st.integers(1, 4))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    del mutated[data.draw(st.integers(0, len(mutated))) :]
    mutated += data.draw(st.binary(max_size=6))
    with suppress(CorruptChunk):
        assert decode(mutated, MATRIX.shape, CLASSES, TABLES).max() < TABLES.symbols
