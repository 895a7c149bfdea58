"""Chooses the attention back end, once at start-up, and says which. Knows no weights and no requests."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence

import torch

from kvmesh.engine.api import KvLayout
from kvmesh.engine.attention.cpu import CpuAttention
from kvmesh.engine.attention.interface import Attention, Segment
from kvmesh.engine.attention.native import SHARING, Kernel, NativeAttention, PackedPool, supports
from kvmesh.engine.attention.native_build import CannotBuild, load_library
from kvmesh.engine.attention.pool import KvPool, PagedKv
from kvmesh.engine.attention.prefixes import Cost
from kvmesh.engine.attention.reference import ReferenceAttention

log = logging.getLogger(__name__)

BackEnd = Callable[[KvLayout, int, Sequence[int | None]], tuple[PagedKv, Attention]]
"""(layout, blocks, sliding window of each layer) -> a pool, and attention over it."""


def torch_back_end(device: torch.device | str = "cpu") -> BackEnd:
    """The back end that runs wherever torch does."""

    def build(layout: KvLayout, blocks: int, windows: Sequence[int | None]) -> tuple[PagedKv, Attention]:
        pool = KvPool(layout, blocks, device)
        return pool, CpuAttention(pool, windows)

    return build


def native_back_end(kernel: Kernel, threads: int = 1, sharing: Cost | None = SHARING) -> BackEnd:
    """The kernel of this CPU, on `threads` threads; `sharing`: when a prefix is read once for all who have it."""

    def build(layout: KvLayout, blocks: int, windows: Sequence[int | None]) -> tuple[PagedKv, Attention]:
        pool = PackedPool(layout, blocks, kernel)
        return pool, NativeAttention(pool, windows, threads, sharing)

    return build


def choose(
    layout: KvLayout, device: torch.device | str, threads: int, library: Callable[[], ctypes.CDLL] = load_library
) -> BackEnd:
    """The best back end that works here. A kernel is taken only once it has agreed with the textbook."""
    if torch.device(device).type != "cpu":
        log.info("attention: torch on %s", device)
        return torch_back_end(device)
    try:
        kernel = checked_kernel(layout, library)
    except CannotBuild as error:
        log.warning("attention: torch, for there is no native kernel: %s", error)
        return torch_back_end(device)
    log.info("attention: native kernel for %s, threads: %d", kernel.isa, threads)
    return native_back_end(kernel, threads)


def checked_kernel(layout: KvLayout, library: Callable[[], ctypes.CDLL] = load_library) -> Kernel:
    """The kernel for KV of this layout.

    Raises:
        CannotBuild: it does not support the layout, cannot be built or loaded, or gives wrong results.
    """
    if not supports(layout):
        raise CannotBuild(f"it does not take {layout.dtype} with heads of {layout.head_dim}")
    kernel = Kernel(library())
    error = _error(kernel, KvLayout(1, 2, layout.head_dim, layout.dtype))
    if not error < (1e-4 if layout.dtype == "float32" else 5e-2):
        raise CannotBuild(f"its results are off by {error:.2g}")
    return kernel


@torch.inference_mode()
def _error(kernel: Kernel, layout: KvLayout) -> float:
    """The largest difference from the textbook over a small mixed batch: a prompt, then a chunk and a decode."""
    generator = torch.Generator().manual_seed(0)
    back_ends = [native_back_end(kernel)(layout, 8, [None])[1], ReferenceAttention(KvPool(layout, 8), [None])]
    differences = []
    for segments in ([Segment(0, 37, [3, 1, 6]), Segment(0, 9, [5])], [Segment(37, 6, [3, 1, 6]), Segment(9, 1, [5])]):
        tokens = sum(segment.tokens for segment in segments)
        q, k, v = (torch.randn(tokens, heads, layout.head_dim, generator=generator) for heads in (6, 2, 2))
        outputs = []
        for attention in back_ends:
            attention.plan(segments)
            dtype = getattr(torch, layout.dtype)
            outputs.append(attention.run(0, q.to(dtype), k.to(dtype), v.to(dtype)).float())
        differences.append((outputs[0] - outputs[1]).abs().max().item())
    return max(differences)
