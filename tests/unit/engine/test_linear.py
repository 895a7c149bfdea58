"""Every way of multiplying against the float32 product, what int4 keeps exactly, and what a precision stands for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvmesh.engine.build import build_runner, resolve_dtype
from kvmesh.engine.linear import PRECISIONS, Dense, packing_of, resolve_precision, zen
from kvmesh.engine.linear.bf16 import OneDnnBf16, Widened, bf16
from kvmesh.engine.linear.by_rows import ByRows
from kvmesh.engine.linear.int4 import GROUP, Int4, fits, on_grid
from kvmesh.engine.linear.int8 import TorchInt8, int8, quantise
from kvmesh.engine.linear.smooth import Smoothed, scales, smooth_int8
from kvmesh.engine.loading import load
from kvmesh.errors import InvalidArgument
from kvmesh.kv.keys import fingerprint
from tests.unit.engine.tiny import tiny_model

needs_bf16 = pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no bfloat16")
needs_zen = pytest.mark.skipif(not zen.available(), reason="zentorch is not installed")
OUT, IN = 96, 128


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def q4_1(rows: int = OUT, columns: int = IN, levels: int = 16) -> Tensor:
    """Weights as dequantising a GGUF file yields them: float16 step and minimum, all of `levels` in reach."""
    groups = columns // GROUP
    codes = torch.randint(0, levels, (rows, groups, GROUP), generator=torch.Generator().manual_seed(3)).float()
    codes[..., 0], codes[..., 1] = 0, levels - 1
    step = (random(rows, groups, 1).abs() * 0.01 + 1e-3).half().float()
    low = (-step * 7.3 + random(rows, groups, 1, seed=1) * 0.01).half().float()
    return (codes * step + low).flatten(1)


def relative_error(product, weight: Tensor, x: Tensor, bias: Tensor | None = None) -> float:
    """Of rows, against float32: the worst."""
    expected = torch.nn.functional.linear(x.float(), weight, bias)
    return ((product(x).float() - expected).norm(dim=1) / expected.norm(dim=1)).max().item()


@pytest.mark.parametrize("rows", [1, 2, 5, 33])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("build", "tolerance"),
    [
        pytest.param(Dense, 1e-6, id="dense"),
        pytest.param(bf16, 0.008, id="bf16"),
        pytest.param(OneDnnBf16, 0.008, id="onednn", marks=needs_bf16),
        pytest.param(Widened, 0.008, id="widened"),
        pytest.param(zen.ZenBf16, 0.008, id="zen-bf16", marks=needs_zen),
        pytest.param(int8, 0.025, id="int8"),
        pytest.param(lambda w, b: TorchInt8(*quantise(w), b), 0.025, id="torch-int8"),
        pytest.param(lambda w, b: zen.ZenInt8(*quantise(w), b), 0.025, id="zen-int8", marks=needs_zen),
        pytest.param(lambda w, b: Int4(on_grid(w), b), 0.008, id="int4"),
    ],
)
def test_against_float32(build, tolerance, biased, rows):
    weight, bias = q4_1(), random(OUT) if biased else None
    x = random(rows, IN, seed=2)
    x = x if build is Dense else x.bfloat16()
    product = build(weight, bias)
    assert product(x).dtype == x.dtype
    assert product(x).shape == (rows, OUT)
    assert relative_error(product, weight, x, bias) < tolerance


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda w: TorchInt8(*quantise(w)), id="torch"),
        pytest.param(lambda w: zen.ZenInt8(*quantise(w)), id="zen", marks=needs_zen),
    ],
)
def test_an_int8_row_does_not_depend_on_its_neighbours(build):
    product, x = build(random(OUT, IN) * 0.05), random(4, IN, seed=2).bfloat16()
    loud = torch.cat((x, random(1, IN, seed=5).bfloat16() * 1000))
    assert torch.equal(product(loud)[:4], product(x))
    assert torch.equal(product(x[:1]), product(x)[:1])


def test_rows_of_zeros_stay_zero():
    weight = random(OUT, IN)
    weight[3] = 0
    x = random(2, IN).bfloat16()
    x[1] = 0
    for product in (int8(weight), TorchInt8(*quantise(weight)), Int4(on_grid(weight))):
        out = product(x)
        assert torch.isfinite(out).all()
        assert out[0, 3] == 0
        assert not out[1].any()


@pytest.mark.parametrize("levels", [16, 15, 12, 9])
def test_weights_of_a_gguf_file_are_held_exactly(levels):
    """With fewer levels in use the span is less than 15 steps, as in Q4_0 groups of one sign."""
    weight = q4_1(levels=levels)
    grid = on_grid(weight)
    assert grid.exact
    torch.testing.assert_close(grid.dequantised(), weight, rtol=0, atol=1e-7)


def test_other_weights_are_rounded_to_half_a_step_and_say_so():
    weight = random(OUT, IN)
    grid = on_grid(weight)
    assert not grid.exact
    assert ((grid.dequantised() - weight).unflatten(1, (-1, GROUP)).abs() <= grid.step * 0.501).all()


def test_a_constant_group_is_exact():
    weight = torch.full((16, 64), 0.25)
    assert on_grid(weight).exact
    assert torch.equal(on_grid(weight).dequantised(), weight)


def test_two_packings_share_the_work_by_rows():
    few, many = Dense(torch.zeros(3, 4)), Dense(torch.ones(3, 4))
    product = ByRows(few, many, most=2)
    assert [bool(product(torch.ones(rows, 4)).any()) for rows in (1, 2, 3)] == [False, False, True]


def test_auto_takes_int4_only_where_it_loses_nothing():
    auto = packing_of("auto", native=lambda: None).layer
    assert isinstance(auto(q4_1(), None, None).few, Int4)
    assert not isinstance(auto(random(OUT, IN), None, None).few, Int4)
    assert not isinstance(auto(random(OUT, 48), None, None).few, Int4)


def test_shapes_that_int4_cannot_hold_are_bfloat16():
    assert not fits(random(OUT, 48))
    product = packing_of("int4", native=lambda: None).layer(random(OUT, 48), None, None)
    assert relative_error(product, random(OUT, 48), random(3, 48).bfloat16()) < 0.008


def test_the_measured_release_of_zentorch_is_the_only_one():
    """An installed package of another version is left alone: its operators may mean something else."""
    assert zen.usable("2.13.0.2", "2.13.0+cpu")
    assert not zen.usable("2.14.0", "2.13.0+cpu")
    assert not zen.usable("2.13.0.2", "2.12.1")
    assert not zen.usable(None, "2.13.0+cpu")


def test_smoothing_saves_what_outliers_would_cost():
    """Two channels are a hundred times larger than the rest and weigh little, as in a language model."""
    weight, x = random(OUT, IN), random(64, IN)
    x[:, [3, 40]] *= 100
    weight[:, [3, 40]] /= 100
    ranges = x.abs().amax(dim=0)
    plain, smooth = smooth_int8(weight, None, None), smooth_int8(weight, None, ranges)
    assert relative_error(smooth, weight, x.bfloat16()) < 0.5 * relative_error(plain, weight, x.bfloat16())


def test_a_channel_never_seen_is_left_as_it_is():
    weight, ranges = random(OUT, IN), torch.zeros(IN)
    assert torch.equal(scales(weight, ranges), torch.ones(IN))
    assert relative_error(smooth_int8(weight, None, ranges), weight, random(5, IN).bfloat16()) < 0.03


def test_without_native_products_every_one_of_a_model_is_watched(folder):
    packing = packing_of("int8", native=lambda: None)
    model = load(folder, "bfloat16", precision="int8", packing=packing)
    assert all(isinstance(layer.qkv, Smoothed) for layer in model.weights.layers)
    assert not any(isinstance(layer.feed_forward.down, Smoothed) for layer in model.weights.layers)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_precision_decides_the_dtype(precision):
    dtype = resolve_dtype("auto", precision)
    assert dtype == ("float32" if precision == "float32" else "bfloat16")
    assert resolve_precision(precision, dtype) == precision


def test_precisions_that_cannot_be():
    with pytest.raises(InvalidArgument, match="'int3' is not one of"):
        resolve_precision("int3", "bfloat16")
    with pytest.raises(InvalidArgument, match="needs the dtype bfloat16, not float32"):
        resolve_precision("int8", "float32")
    with pytest.raises(InvalidArgument, match="needs a CPU"):
        resolve_precision("int4", "bfloat16", "cuda")
    assert resolve_precision("auto", "bfloat16", "cuda") == "bf16"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "tie_word_embeddings": True}
    return tiny_model("llama", tmp_path_factory.mktemp("llama"), **shape)[1]


@pytest.mark.parametrize("precision", ["bf16", "int8", "auto"])
def test_a_packed_model_is_near_the_dense_one(folder, precision):
    rows = torch.arange(20)
    logits = []
    for name, dtype in (("float32", "float32"), (precision, "bfloat16")):
        model = load(folder, dtype, precision=name)
        assert str(model.dtype) == f"torch.{dtype}"
        assert model.weights.head is not None
        logits.append(model.logits(model.embed(rows)))
    assert ((logits[1] - logits[0]).norm() / logits[0].norm()).item() < 0.03


def test_float32_is_untouched(folder):
    layer = load(folder, "float32").weights.layers[0]
    assert isinstance(layer.qkv, Dense)
    assert layer.qkv.weight.dtype == torch.float32


def test_kv_of_different_precisions_is_not_shared(folder):
    dtypes = {precision: resolve_dtype("auto", precision) for precision in PRECISIONS}
    prints = {fingerprint(folder.layout(dtype, precision)) for precision, dtype in dtypes.items()}
    assert len(prints) == len(PRECISIONS)


def test_a_runner_of_low_precision_keeps_bfloat16_kv(folder):
    runner = build_runner(folder, precision="int8", blocks=4, device="cpu")
    assert runner.layout.dtype == "bfloat16"
