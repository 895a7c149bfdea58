"""The native attention back end for tests that hand every back end a pool of the plain layout."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from kvmesh.engine.attention.choice import checked_kernel
from kvmesh.engine.attention.native import NativeAttention, PackedPool
from kvmesh.engine.attention.native_build import CannotBuild
from kvmesh.engine.attention.pool import KvPool


def native_attention(pool: KvPool, windows: Sequence[int | None]) -> NativeAttention:
    """Over a packed pool of the same shape as `pool`, filled with NaN."""
    try:
        packed = PackedPool(pool.layout, pool.blocks, checked_kernel(pool.layout))
    except CannotBuild as error:
        pytest.skip(f"no native kernel here: {error}")
    packed.keys.fill_(float("nan"))
    packed.values.fill_(float("nan"))
    return NativeAttention(packed, windows)
