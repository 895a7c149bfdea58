"""All layers in one native call against float32 and the same products called one by one; which models it takes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.engine.attention.choice import checked_kernel, native_back_end, torch_back_end
from kvmesh.engine.attention.interface import Segment
from kvmesh.engine.attention.native_build import CannotBuild
from kvmesh.engine.forward import EagerForward
from kvmesh.engine.forward_choice import forward_of
from kvmesh.engine.linear import packing_of
from kvmesh.engine.linear.native import products
from kvmesh.engine.loading import load
from kvmesh.engine.native_forward import NativeForward
from kvmesh.engine.runner import kv_layout
from kvmesh.types import BLOCK_TOKENS
from tests.unit.engine.tiny import VOCABULARY, tiny_model

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES = {"llama": {}, "mistral": {"sliding_window": 20}, "qwen2": {}, "qwen3": {"head_dim": 16}}
BLOCKS = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        name: tiny_model(name, tmp_path_factory.mktemp(name), **SHAPE, **more)[1] for name, more in FAMILIES.items()
    }


@pytest.fixture(scope="module")
def exact(folders):
    return {name: load(folder, "float32") for name, folder in folders.items()}


@pytest.fixture(scope="module")
def decoders(folders):
    """By family and precision."""
    if products() is None:
        pytest.skip("no native products here")
    precisions = ("bf16", "int8", "int4")
    return {(name, p): load(folder, "bfloat16", precision=p) for name, folder in folders.items() for p in precisions}


def attention_of(decoder, threads=1):
    layout = kv_layout(decoder)
    try:
        return native_back_end(checked_kernel(layout), threads)(layout, BLOCKS, decoder.windows)[1]
    except CannotBuild as error:
        pytest.skip(f"no native kernel here: {error}")


def run(forward, segments, seed):
    """Hidden states of random tokens."""
    count = sum(segment.tokens for segment in segments)
    tokens = torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    positions = [p for segment in segments for p in range(segment.start, segment.end)]
    with torch.inference_mode():
        return forward(tokens, positions, segments).float().clone()


@settings(max_examples=20, deadline=None)
@given(
    family=st.sampled_from(["llama", "mistral", "qwen2"]), precision=st.sampled_from(["bf16", "int8", "int4"]),
    first=st.integers(1, 40), second=st.integers(1, 40),
    chunk=st.integers(1, 20), seed=st.integers(0, 99), threads=st.sampled_from([1, 3]),
)  # fmt: skip
def test_it_is_as_near_to_float32_as_the_layers_one_by_one(
    decoders, exact, family, precision, first, second, chunk, seed, threads
):
    """Prompts, a chunk beside a decode, and decodes: each after what the iterations before left in the pool."""
    decoder, tables = decoders[family, precision], ((3, 1, 6, 8, 10, 4, 9), (5, 0, 7, 2))
    ways = (
        forward_of(decoder, attention_of(decoder, threads)),
        EagerForward(decoder, attention_of(decoder)),
        EagerForward(exact[family], attention_of(exact[family])),
    )
    assert isinstance(ways[0], NativeForward)
    iterations = (
        [Segment(0, first, tables[0]), Segment(0, second, tables[1])],
        [Segment(first, chunk, tables[0]), Segment(second, 1, tables[1])],
        [Segment(first + chunk, 1, tables[0]), Segment(second + 1, 1, tables[1])],
    )
    for number, segments in enumerate(iterations):
        native, eager, expected = (run(forward, segments, seed + number) for forward in ways)
        errors = [((found - expected).norm() / expected.norm()).item() for found in (native, eager)]
        assert errors[0] < min(1.0, 2 * errors[1] + 0.05)


def test_a_shared_prefix_is_read_as_if_each_had_its_own(decoders):
    decoder, blocks = decoders["llama", "int8"], list(range(6))
    native, rows = forward_of(decoder, attention_of(decoder)), 5 * BLOCK_TOKENS
    run(native, [Segment(0, rows, blocks)], 0)
    alone = run(native, [Segment(rows, 1, [*blocks[:5], 6])], 1)
    together = run(native, [Segment(rows, 1, [*blocks[:5], last]) for last in (7, 8, 9, 10)], 1)
    assert ((together[0] - alone[0]).norm() / alone.norm()).item() < 0.02


def test_other_models_are_computed_operation_by_operation(decoders):
    decoder = decoders["qwen3", "int8"]
    assert isinstance(forward_of(decoder, attention_of(decoder)), EagerForward)


def test_other_attention_is_called_layer_by_layer(decoders):
    decoder = decoders["llama", "int8"]
    _, attention = torch_back_end()(kv_layout(decoder), BLOCKS, decoder.windows)
    assert isinstance(forward_of(decoder, attention), EagerForward)


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "float32"), ("bfloat16", "bf16"), ("bfloat16", "int8")])
def test_other_products_are_called_one_by_one(tmp_path, dtype, precision):
    folder = tiny_model("llama", tmp_path, **SHAPE)[1]
    decoder = load(folder, dtype, precision=precision, packing=packing_of(precision, native=lambda: None))
    assert isinstance(forward_of(decoder, attention_of(decoder)), EagerForward)


def test_widths_that_the_products_do_not_take(tmp_path):
    folder = tiny_model("llama", tmp_path, **SHAPE | {"intermediate_size": 96})[1]
    decoder = load(folder, "bfloat16", precision="int8")
    assert isinstance(forward_of(decoder, attention_of(decoder)), EagerForward)
