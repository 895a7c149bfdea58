"""Products by our own library: weights of 4 or 8 bits with activations in 8-bit codes, a scale per group of a row; or
both in bfloat16.

A kernel of ours because the libraries scale a row of activations as a whole, where one outlier takes the digits of
all others: with a scale per group W8A8 is as good as bfloat16 (bench/quality.py) and wants no smoothing. And because
all layers can then be one call (`native_forward`). bfloat16 needs AVX2 and FMA, the others AVX512-VNNI;
kernel/product.hpp has the layouts.
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from kvmesh.engine.attention.native_build import CannotBuild, load_library
from kvmesh.engine.linear.arena import Arena
from kvmesh.engine.linear.int4 import Grid
from kvmesh.engine.linear.int8 import quantise
from kvmesh.engine.linear.native_packing import pack_bf16, pack_int4, pack_int8

log = logging.getLogger(__name__)


class Matrix(ctypes.Structure):
    """As kernel/product.hpp has it: bfloat16, or one or both of the others, of which `int4` is for up to `few` rows."""

    _fields_ = (
        ("int4", ctypes.c_void_p),
        ("int8", ctypes.c_void_p),
        ("bf16", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("inputs", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("few", ctypes.c_int32),
    )


class Products:
    """The library's products, and `threads` threads that share each of them, asleep when there is none.

    `integers`: it has those of 4 and 8 bits.
    """

    def __init__(self, library: ctypes.CDLL, threads: int) -> None:
        pointer, integer = ctypes.c_void_p, ctypes.c_int32
        self.library = library
        self.integers = bool(library.kvmesh_integer_products())
        self.multiply = library.kvmesh_multiply
        self.multiply.argtypes, self.multiply.restype = (pointer, pointer, pointer, integer, pointer), None
        library.kvmesh_crew_create.argtypes, library.kvmesh_crew_create.restype = (integer,), pointer
        library.kvmesh_crew_destroy.argtypes, library.kvmesh_crew_destroy.restype = (pointer,), None
        self.crew: int = library.kvmesh_crew_create(threads)
        self.arena = Arena()
        self._close = weakref.finalize(self, library.kvmesh_crew_destroy, self.crew)


def products(library: Callable[[], ctypes.CDLL] = load_library) -> Products | None:
    """The products of this machine's library; None if there are none, which is said."""
    try:
        loaded = library()
    except CannotBuild as error:
        log.warning("products: not native: %s", error)
        return None
    return Products(loaded, torch.get_num_threads()) if hasattr(loaded, "kvmesh_multiply") else None


class NativeProduct:
    """Implements `Linear` for bfloat16 rows, of a weight `[out, in]` in one packing, or both `int8` and `grid`; `wide`
    ones return the float32 that they summed in."""

    def __init__(
        self,
        products: Products,
        *,
        bf16: Tensor | None = None,
        int8: Tensor | None = None,
        grid: Grid | None = None,
        few: int = 0,
        bias: Tensor | None = None,
        wide: bool = False,
    ) -> None:
        self.products, self._wide = products, wide
        quantised, scales = (None, None) if int8 is None else quantise(int8)
        packings = (
            None if grid is None else pack_int4(grid),
            None if quantised is None else pack_int8(quantised),
            None if bf16 is None else pack_bf16(bf16),
        )
        kept = [None if packed is None else products.arena.keep(packed) for packed in packings]
        self._tensors = (*kept, scales, None if bias is None else bias.float().contiguous())
        addresses = (tensor if tensor is None else tensor.data_ptr() for tensor in self._tensors)
        outputs, inputs = next(_shape(weight) for weight in (bf16, int8, grid) if weight is not None)
        self.matrix = Matrix(*addresses, inputs, outputs, few)
        self._address = ctypes.addressof(self.matrix)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = torch.empty(len(x), self.matrix.outputs)
        if len(x):
            self.products.multiply(self.products.crew, self._address, x.data_ptr(), len(x), out.data_ptr())
        return out if self._wide else out.to(x.dtype)


def _shape(weight: Tensor | Grid) -> tuple[int, int]:
    codes = weight.codes.flatten(1) if isinstance(weight, Grid) else weight
    return len(codes), codes.shape[1]
