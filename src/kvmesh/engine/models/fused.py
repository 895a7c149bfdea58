"""What lies between the matrix products of a layer, in as few passes as can be: residual and norm, gate, rotation.

A decode step of a small model spends more time starting small operations than computing them. So each of these is one
call of the native library where that is there, and a few of torch's where it is not. Knows no weights.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kvmesh.engine.attention.native_build import CannotBuild, load_library
from kvmesh.engine.models.rope import rotate

log = logging.getLogger(__name__)


class Fused(Protocol):
    """`x` and what is returned are `[tokens, ...]`, of one dtype; norms count in float32 where their weight does."""

    def add_norm(self, hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """`hidden + delta`, perhaps in the memory of `hidden`, and its RMSNorm (arXiv 1910.07467)."""

    def silu_gate(self, gate_up: Tensor) -> Tensor:
        """`silu(gate) * up` of `[tokens, 2 * width]`: a new `[tokens, width]`."""

    def rotate(self, qkv: Tensor, heads: int, cos: Tensor, signed_sin: Tensor) -> Tensor:
        """The first `heads` heads of `[tokens, heads, head_dim]` rotated, perhaps in its memory, the others as is."""


class TorchFused:
    """Implements `Fused` with torch, wherever it runs."""

    def add_norm(self, hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        hidden = hidden if delta is None else hidden + delta
        return hidden, rms_norm(hidden, weight, eps)

    def silu_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def rotate(self, qkv: Tensor, heads: int, cos: Tensor, signed_sin: Tensor) -> Tensor:
        return torch.cat((rotate(qkv[:, :heads], cos, signed_sin), qkv[:, heads:]), dim=1)


class NativeFused(TorchFused):
    """Implements `Fused` for float32 and bfloat16 on a CPU; what the library does not take is left to torch."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        self._add_norm, self._gate, self._rotate = library.kvmesh_add_norm, library.kvmesh_gate, library.kvmesh_rotate
        self._add_norm.argtypes = (pointer, pointer, pointer, pointer, long, long, ctypes.c_float, integer, integer)
        self._gate.argtypes = (pointer, pointer, long, long, integer)
        self._rotate.argtypes = (pointer, pointer, pointer, long, long, integer, integer, integer)
        for function in (self._add_norm, self._gate, self._rotate):
            function.restype = None

    def add_norm(self, hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if not (_plain(hidden) and (delta is None or _plain(delta))):
            return super().add_norm(hidden, delta, weight, eps)
        out, (rows, width) = torch.empty_like(hidden), hidden.shape
        addresses = (hidden.data_ptr(), None if delta is None else delta.data_ptr(), weight.data_ptr(), out.data_ptr())
        narrow = torch.bfloat16
        self._add_norm(*addresses, rows, width, eps, hidden.dtype == narrow, weight.dtype == narrow)
        return hidden, out

    def silu_gate(self, gate_up: Tensor) -> Tensor:
        if not _plain(gate_up):
            return super().silu_gate(gate_up)
        rows, width = gate_up.shape
        out = torch.empty(rows, width // 2, dtype=gate_up.dtype)
        self._gate(gate_up.data_ptr(), out.data_ptr(), rows, width // 2, gate_up.dtype == torch.bfloat16)
        return out

    def rotate(self, qkv: Tensor, heads: int, cos: Tensor, signed_sin: Tensor) -> Tensor:
        tokens, _, dim = qkv.shape
        if not _plain(qkv) or cos.shape[-1] != dim:
            return super().rotate(qkv, heads, cos, signed_sin)
        addresses = (qkv.data_ptr(), cos.data_ptr(), signed_sin.data_ptr())
        self._rotate(*addresses, tokens, qkv.stride(0), heads, dim, qkv.dtype == torch.bfloat16)
        return qkv


def _plain(x: Tensor) -> bool:
    return x.is_contiguous() and not x.requires_grad


def fused_for(
    dtype: torch.dtype, device: torch.device | str, library: Callable[[], ctypes.CDLL] = load_library
) -> Fused:
    """The fastest that works here."""
    if torch.device(device).type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return TorchFused()
    try:
        return NativeFused(library())
    except CannotBuild as error:
        log.warning("norms and gates: torch, for there is no native library: %s", error)
        return TorchFused()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, in the precision of a float32 `weight` if it is one."""
    if weight.dtype == x.dtype:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)
