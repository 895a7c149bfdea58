"""Products of the native library against float32: all packings, any number of rows and threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.engine.attention.native_build import CannotBuild, load_library
from kvmesh.engine.linear import packing_of
from kvmesh.engine.linear.arena import Arena
from kvmesh.engine.linear.bf16 import bf16
from kvmesh.engine.linear.int4 import GROUP, Grid, on_grid
from kvmesh.engine.linear.native import NativeProduct, Products, products
from kvmesh.engine.linear.native_packing import fits, pack_bf16, pack_int4, pack_int8
from kvmesh.engine.linear.smooth import Smoothed
from tests.unit.engine.native_kernel import avx2_products
from tests.unit.engine.test_linear import q4_1, random, relative_error

INPUTS = 192


@pytest.fixture(scope="module")
def library():
    native = products()
    if native is None:
        pytest.skip("no native products here")
    return native


@pytest.fixture(scope="module")
def avx2():
    """As on a CPU that has nothing newer: bfloat16 alone."""
    return avx2_products()


def product(library, weight, bits, **more) -> NativeProduct:
    if bits == 4:
        return NativeProduct(library, grid=on_grid(weight), **more)
    return NativeProduct(library, **({"int8": weight} if bits == 8 else {"bf16": weight}), **more)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 150), vectors=st.integers(1, 14), bits=st.sampled_from([4, 8, 16]), biased=st.booleans(),
    scale=st.sampled_from([1e-4, 1.0, 300.0]),
)  # fmt: skip
def test_against_float32(library, rows, vectors, bits, biased, scale):
    weight, bias = q4_1(16 * vectors, INPUTS), scale * random(16 * vectors) if biased else None
    x = (scale * random(rows, INPUTS, seed=rows)).bfloat16()
    found = product(library, weight, bits, bias=bias)
    assert found(x).dtype == x.dtype
    assert relative_error(found, weight, x, bias) < (0.01 if bits == 16 else 0.035)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 150), vectors=st.integers(1, 14), biased=st.booleans())
def test_bfloat16_where_there_is_no_avx512(avx2, rows, vectors, biased):
    weight, bias = random(16 * vectors, INPUTS), random(16 * vectors, seed=3) if biased else None
    x, found = random(rows, INPUTS, seed=rows).bfloat16(), product(avx2, weight, 16, bias=bias)
    assert relative_error(found, weight, x, bias) < 0.01
    assert torch.equal(found(x), torch.cat([found(row[None]) for row in x]))


def test_a_precision_without_its_products_is_the_libraries(avx2):
    layers = {name: packing_of(name, native=lambda: avx2).layer for name in ("bf16", "int8")}
    ranges = torch.ones(64)
    kinds = {name: type(pack(random(32, 64), None, ranges)) for name, pack in layers.items()}
    assert kinds == {"bf16": NativeProduct, "int8": Smoothed}


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("rows", [1, 3, 6, 140])
def test_threads_change_nothing(library, bits, rows):
    weight, x = q4_1(208, INPUTS), random(rows, INPUTS).bfloat16()
    expected = product(Products(library.library, 1), weight, bits)(x)
    shared = product(Products(library.library, 4), weight, bits)
    assert all(torch.equal(shared(x), expected) for _ in range(50))


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_row_does_not_depend_on_its_neighbours(library, bits):
    found, x = product(library, q4_1(96, INPUTS), bits), random(7, INPUTS).bfloat16()
    loud = torch.cat((x, 1000 * random(1, INPUTS, seed=5).bfloat16()))
    assert torch.equal(found(loud)[:7], found(x))
    assert torch.equal(found(x[2:3]), found(x)[2:3])


def test_an_outlier_costs_its_group_alone(library):
    weight, x = q4_1(96, INPUTS), random(5, INPUTS)
    x[:, 7] = 1000
    weight[:, 7] = 0
    assert relative_error(product(library, weight, 8), weight, x.bfloat16()) > 0.05
    x[:, :64] = 0
    x[:, 7] = 1000
    assert relative_error(product(library, weight, 8), weight, x.bfloat16()) < 0.02


def test_few_rows_take_int4_and_more_take_int8(library):
    four, eight = q4_1(32, INPUTS), -q4_1(32, INPUTS)
    both, x = NativeProduct(library, int8=eight, grid=on_grid(four), few=3), random(4, INPUTS).bfloat16()
    assert torch.equal(both(x[:3]), product(library, four, 4)(x[:3]))
    assert torch.equal(both(x), product(library, eight, 8)(x))


def test_no_rows_and_rows_of_zeros(library):
    found = product(library, q4_1(32, INPUTS), 8, wide=True)
    assert found(torch.empty(0, INPUTS, dtype=torch.bfloat16)).shape == (0, 32)
    assert not found(torch.zeros(2, INPUTS, dtype=torch.bfloat16)).any()
    assert found(torch.zeros(1, INPUTS, dtype=torch.bfloat16)).dtype == torch.float32


def test_shapes_that_fit():
    assert fits(torch.empty(48, 128))
    assert not fits(torch.empty(40, 128))
    assert not fits(torch.empty(48, 96))


def test_packed_weights_lie_as_the_kernel_reads_them():
    codes = torch.randint(0, 16, (32, 2, GROUP), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    step, low = (random(32, 2, 1, seed=seed).half().float() for seed in (1, 2))
    packed, output, group, place = pack_int4(Grid(codes, low, step, True)), 21, 1, 13
    block, lane = packed[output // 16, group], output % 16
    byte = int(block[place // 4 * 64 + lane * 4 + place % 4])
    assert (byte & 15, byte >> 4) == (codes[output, group, place], codes[output, group, place + 16])
    halves = block[256:].view(torch.float16).float()
    assert (halves[lane], halves[16 + lane]) == (step[output, group, 0], low[output, group, 0])

    eight = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).view(16, 16).repeat(2, 4)
    assert int(pack_int8(eight)[1, 5, 3, 2]) == int(eight[19, 22]) + 128
    assert float(pack_bf16(eight)[1, 5, 3, 1]) == float(eight[19, 11])


def test_what_a_precision_packs(library):
    exact, other, odd = q4_1(32, INPUTS), random(32, INPUTS), random(32, 96)
    auto, int4, int8 = (packing_of(name, native=lambda: library).layer for name in ("auto", "int4", "int8"))
    assert [bool(auto(weight, None, None).matrix.int4) for weight in (exact, other)] == [True, False]
    assert bool(auto(exact, None, None).matrix.int8)
    assert (bool(int4(other, None, None).matrix.int4), bool(int4(other, None, None).matrix.int8)) == (True, False)
    assert not int8(exact, None, None).matrix.int4
    assert packing_of("bf16", native=lambda: library).layer(exact, None, None).matrix.bf16
    assert type(auto(odd, None, None)) is type(bf16(odd))
    head = packing_of("auto", native=lambda: library).head(exact, None, None)
    assert head(random(1, INPUTS).bfloat16()).dtype == torch.float32


def test_without_a_library_the_other_products_serve(caplog):
    def none():
        raise CannotBuild("no compiler")

    assert products(none) is None
    assert "no compiler" in caplog.text
    assert isinstance(packing_of("int8", native=lambda: None).layer(random(32, 64), None, torch.ones(64)), Smoothed)


def test_a_library_for_any_cpu_has_no_products():
    try:
        plain = load_library(targets=[()])
    except CannotBuild as error:
        pytest.skip(f"no native library here: {error}")
    assert products(lambda: plain) is None


def test_an_arena_keeps_tensors_apart_and_alive():
    arena = Arena(chunk=1 << 12)
    tensors = [random(size, 3, seed=size) for size in (5, 300, 700, 1, 90)]
    kept = [arena.keep(tensor) for tensor in tensors]
    del arena
    assert all(map(torch.equal, kept, tensors))
    assert all(tensor.data_ptr() % 64 == 0 for tensor in kept)
