"""The embedded quantiser: each rendition is what its own step would give, and comes back from the coarser one."""

from contextlib import suppress

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvmesh.kv.codec import CorruptChunk
from kvmesh.kv.codecs import rans
from kvmesh.kv.codecs.embedded import LARGEST, First, Refinement, dequantise, parents, quantise

RENDITIONS = 4


def values(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(rows, columns)) * np.exp(rng.normal(1, 1.5, columns))).astype(np.float32)


def coders(columns: int, seed: int = 0) -> tuple[First, Refinement]:
    rng = np.random.default_rng(seed)
    first = rans.Tables(rans.quantise(rng.random((3, 8)) + 0.01))
    weights = rng.random((6, 3)) + 0.01
    weights[1::2, 2] = 0
    classes = rng.integers(0, 3, columns).astype("<u2")
    return First(classes, first), Refinement(classes, rans.Tables(rans.quantise(weights)))


@given(st.integers(0, 99), st.floats(0.01, 5))
@example(26, 0.01171875)
@settings(deadline=None)
def test_each_rendition_is_what_its_own_step_gives(seed, step):
    data = values(5, 7, seed)
    for i, cells in enumerate(quantise(data, step, RENDITIONS)):
        own = step * 2 ** (RENDITIONS - 1 - i)
        alone = quantise(data, own, i + 1)[-1]  # As far as this rendition reaches.
        assert (cells == alone).all()
        error = np.abs(dequantise(cells, own) - data)
        assert (error <= np.where(np.abs(cells) == 1, 0.2501, 0.5001) * own).all()


def test_cells_have_the_parents_that_the_module_promises():
    cells = np.array([[0, 1, -1, 2, -2, 3, 4, -5, -6, 7]], np.int32)
    assert parents(cells).tolist() == [[0, 0, 0, 1, -1, 2, 2, -3, -3, 4]]


def test_what_is_beyond_all_cells_is_cut_off():
    cells = quantise(np.array([[1e30, -1e30, 3e8]], np.float32), 1e-3, RENDITIONS)
    assert cells[0].tolist() == [[LARGEST, -LARGEST, LARGEST]]
    assert np.isfinite(dequantise(cells[-1], 1e-3)).all()


@given(st.integers(0, 9), st.integers(0, 11), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_round_trip(rows, columns, seed):
    first, refinement = coders(columns, seed)
    coarse, fine = quantise(values(rows, columns, seed), 0.7, 2)
    chosen = np.arange(columns)
    back = first.decode(first.encode(coarse, chosen), rows, chosen)
    assert (back == coarse).all()
    assert (refinement.decode(refinement.encode(coarse, fine, chosen), back, chosen) == fine).all()


def test_some_columns_can_be_coded_alone():
    first, refinement = coders(9)
    coarse, fine = quantise(values(6, 9), 0.7, 2)
    chosen = np.array([0, 1, 2, 5, 8])
    back = first.decode(first.encode(coarse[:, chosen], chosen), 6, chosen)
    coded = refinement.encode(coarse[:, chosen], fine[:, chosen], chosen)
    assert (refinement.decode(coded, back, chosen) == fine[:, chosen]).all()


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_forged_strings_are_refused_or_cells(data):
    first, refinement = coders(7)
    coarse, fine = quantise(values(6, 7), 0.7, 2)
    chosen = np.arange(7)
    for coder, coded in ((first, first.encode(coarse, chosen)), (refinement, refinement.encode(coarse, fine, chosen))):
        forged = bytearray(coded)
        for _ in range(data.draw(st.integers(1, 3))):
            forged[data.draw(st.integers(0, len(forged) - 1))] = data.draw(st.integers(0, 255))
        del forged[data.draw(st.integers(0, len(forged))) if data.draw(st.booleans()) else len(forged) :]
        with suppress(CorruptChunk):
            back = first.decode(forged, 6, chosen) if coder is first else refinement.decode(forged, coarse, chosen)
            assert back.shape == coarse.shape


def test_tables_that_cannot_code_everything_are_refused():
    classes = np.zeros(3, "<u2")
    with pytest.raises(ValueError, match="no escape"):
        First(classes, rans.Tables(np.array([[0, 1024, 2048, 1024]], "<u2")))
    with pytest.raises(ValueError, match="cannot occur"):
        Refinement(classes, rans.Tables(np.array([[2048, 2048, 0], [2048, 2048, 0]], "<u2")))
    with pytest.raises(ValueError, match="three values"):
        Refinement(classes, rans.Tables(np.array([[1024, 2048, 1024], [1024, 2048, 1024]], "<u2")))
    with pytest.raises(ValueError, match="classes"):
        First(classes + np.uint16(1), rans.Tables(np.array([[1024, 1024, 1024, 1024]], "<u2")))
