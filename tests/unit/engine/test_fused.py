"""Norms, gates and rotations of the native library against torch's, for any shape."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.engine.attention.native_build import TARGETS, CannotBuild, load_library
from kvmesh.engine.models.fused import NativeFused, TorchFused, fused_for
from kvmesh.engine.models.rope import rotation

TOLERANCE = {torch.float32: {"atol": 2e-6, "rtol": 2e-6}, torch.bfloat16: {"atol": 2e-2, "rtol": 1e-2}}
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
PLAIN = TorchFused()


@pytest.fixture(scope="module", params=[TARGETS[0], ()], ids=["this-cpu", "any-cpu"])
def native(request):
    try:
        return NativeFused(load_library(targets=[request.param]))
    except CannotBuild as error:
        pytest.skip(f"no native library here: {error}")


def randn(seed, *shape, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32), rows=st.integers(1, 5), width=st.integers(1, 100), dtype=DTYPES,
    wide_weight=st.booleans(), first=st.booleans(), scale=st.sampled_from([1e-3, 1.0, 50.0]),
)  # fmt: skip
def test_add_norm(native, seed, rows, width, dtype, wide_weight, first, scale):
    hidden = randn(seed, rows, width, scale=scale).to(dtype)
    delta = None if first else randn(seed + 1, rows, width, scale=scale).to(dtype)
    weight = (1 + 0.2 * randn(seed + 2, width)).to(torch.float32 if wide_weight else dtype)
    expected = PLAIN.add_norm(hidden.clone(), delta, weight, 1e-5)
    found = native.add_norm(hidden.clone(), delta, weight, 1e-5)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], **TOLERANCE[dtype])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32), rows=st.integers(1, 4), width=st.integers(1, 70), dtype=DTYPES,
    scale=st.sampled_from([1.0, 30.0, 200.0]),
)  # fmt: skip
def test_silu_gate(native, seed, rows, width, dtype, scale):
    gate_up = randn(seed, rows, 2 * width, scale=scale).to(dtype)
    found, expected = native.silu_gate(gate_up), PLAIN.silu_gate(gate_up)
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype]["atol"] * scale, rtol=TOLERANCE[dtype]["rtol"])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32), rows=st.integers(1, 4), heads=st.integers(1, 4), half=st.integers(1, 40), dtype=DTYPES
)
def test_rotate(native, seed, rows, heads, half, dtype):
    qkv = randn(seed, rows, heads + 1, 2 * half).to(dtype)
    positions = torch.randint(0, 5000, (rows,), generator=torch.Generator().manual_seed(seed))
    cos, sin = rotation(positions, 1.0 / 10_000 ** (torch.arange(half) / half), dtype)
    found, expected = native.rotate(qkv.clone(), heads, cos, sin), PLAIN.rotate(qkv, heads, cos, sin)
    assert torch.equal(found[:, heads:], qkv[:, heads:])
    torch.testing.assert_close(found, expected, **TOLERANCE[dtype])


def test_gradients_are_torchs(native):
    x = randn(0, 2, 8).requires_grad_()
    hidden, normed = native.add_norm(x, None, torch.ones(8), 1e-5)
    (hidden.sum() + normed.sum() + native.silu_gate(x).sum()).backward()
    assert x.grad is not None


def test_without_a_library_torch_computes(caplog):
    def none():
        raise CannotBuild("no compiler")

    assert type(fused_for(torch.float32, "cpu", none)) is TorchFused
    assert "no compiler" in caplog.text
    assert type(fused_for(torch.float16, "cpu", none)) is TorchFused
