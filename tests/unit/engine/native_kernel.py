"""The native attention back end for tests that hand every back end a pool of the plain layout."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from kvmesh.engine.attention.choice import checked_kernel
from kvmesh.engine.attention.native import NativeAttention, PackedPool
from kvmesh.engine.attention.native_build import CannotBuild, load_library
from kvmesh.engine.attention.pool import KvPool
from kvmesh.engine.linear.native import Products

AVX2 = ("-mavx2", "-mfma")
"""What compilers take for CPUs without AVX-512."""


def avx2_products(threads: int = 1) -> Products:
    """Of a library compiled for such a CPU, where this one runs it."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this CPU has no AVX2")
    try:
        return Products(load_library(targets=[AVX2]), threads)
    except CannotBuild as error:
        pytest.skip(f"no native library for AVX2 here: {error}")


def native_attention(pool: KvPool, windows: Sequence[int | None]) -> NativeAttention:
    """Over a packed pool of the same shape as `pool`, filled with NaN."""
    try:
        packed = PackedPool(pool.layout, pool.blocks, checked_kernel(pool.layout))
    except CannotBuild as error:
        pytest.skip(f"no native kernel here: {error}")
    packed.keys.fill_(float("nan"))
    packed.values.fill_(float("nan"))
    return NativeAttention(packed, windows)
