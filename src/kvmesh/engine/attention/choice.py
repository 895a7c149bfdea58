"""Chooses the attention back end, once at start-up, and says which. Knows no weights and no requests."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Collection, Sequence

import torch

from kvmesh.engine.api import KvLayout
from kvmesh.engine.attention.agreement import BLOCKS, largest_error
from kvmesh.engine.attention.cpu import CpuAttention
from kvmesh.engine.attention.flashinfer_api import FlashInfer, import_flashinfer
from kvmesh.engine.attention.flashinfer_choice import checked_flashinfer
from kvmesh.engine.attention.interface import Attention, BackEnd
from kvmesh.engine.attention.latent import LatentAttention
from kvmesh.engine.attention.native import SHARING, Kernel, NativeAttention, PackedPool, supports
from kvmesh.engine.attention.native_build import CannotBuild, load_library
from kvmesh.engine.attention.pool import KvPool, PagedKv
from kvmesh.engine.attention.prefixes import Cost

log = logging.getLogger(__name__)


def torch_back_end(device: torch.device | str = "cpu") -> BackEnd:
    """The back end that runs wherever torch does."""

    def build(layout: KvLayout, blocks: int, windows: Sequence[int | None]) -> tuple[PagedKv, Attention]:
        pool = KvPool(layout, blocks, device)
        return pool, (LatentAttention if layout.planes == 1 else CpuAttention)(pool, windows)

    return build


def native_back_end(kernel: Kernel, threads: int = 1, sharing: Cost | None = SHARING) -> BackEnd:
    """The kernel of this CPU, on `threads` threads; `sharing`: when a prefix is read once for all who have it."""

    def build(layout: KvLayout, blocks: int, windows: Sequence[int | None]) -> tuple[PagedKv, Attention]:
        pool = PackedPool(layout, blocks, kernel)
        return pool, NativeAttention(pool, windows, threads, sharing)

    return build


def choose(
    layout: KvLayout,
    device: torch.device | str,
    threads: int,
    library: Callable[[], ctypes.CDLL] = load_library,
    *,
    heads: int = 0,
    windows: Collection[int | None] = (None,),
    flashinfer: Callable[[], FlashInfer] = import_flashinfer,
) -> BackEnd:
    """The best back end that works here. A kernel is taken only once it has agreed with the textbook.

    `heads`, `windows`: query heads and layers' windows of the model, which FlashInfer wants to know.
    """
    if torch.device(device).type != "cpu":
        return _choose_cuda(layout, device, heads, windows, flashinfer)
    try:
        kernel = checked_kernel(layout, library)
    except CannotBuild as error:
        log.warning("attention: torch, for there is no native kernel: %s", error)
        return torch_back_end(device)
    log.info("attention: native kernel for %s, threads: %d", kernel.isa, threads)
    return native_back_end(kernel, threads)


def _choose_cuda(
    layout: KvLayout,
    device: torch.device | str,
    heads: int,
    windows: Collection[int | None],
    flashinfer: Callable[[], FlashInfer],
) -> BackEnd:
    try:
        back_end = checked_flashinfer(layout, heads or layout.kv_heads, device, flashinfer, windows)
    except CannotBuild as error:
        log.warning("attention: torch on %s: %s", device, error)
        return torch_back_end(device)
    log.info("attention: FlashInfer on %s", device)
    return back_end


def checked_kernel(layout: KvLayout, library: Callable[[], ctypes.CDLL] = load_library) -> Kernel:
    """The kernel for KV of this layout.

    Raises:
        CannotBuild: it does not support the layout, cannot be built or loaded, or gives wrong results.
    """
    if not supports(layout):
        raise CannotBuild(f"it does not take {layout.dtype} with heads of {layout.head_dim}")
    kernel = Kernel(library())
    small = KvLayout(1, 2, layout.head_dim, layout.dtype)
    error = largest_error(native_back_end(kernel)(small, BLOCKS, [None])[1], small, heads=6)
    if not error < (1e-4 if layout.dtype == "float32" else 5e-2):
        raise CannotBuild(f"its results are off by {error:.2g}")
    return kernel
