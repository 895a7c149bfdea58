"""From the name of a precision to the products that hold it. Knows how good and fast they are, by measurement;
measures nothing.

| precision | layers                                                    | head     | activations and KV |
|-----------|-----------------------------------------------------------|----------|--------------------|
| float32   | dense, in the dtype asked for                             | dense    | that dtype         |
| bf16      | prepacked bfloat16                                        | bfloat16 | bfloat16           |
| int8      | W8A8                                                      | W8A8     | bfloat16           |
| int4      | int4, of activations in 8 bits                            | W8A8     | bfloat16           |
| auto      | int4 for few rows if that loses nothing, W8A8 for others  | W8A8     | bfloat16           |

These are the native products: of bf16 with AVX2 and FMA, of the others with AVX512-VNNI. Where there are none, the
libraries' serve, which scale a row as a whole: W8A8 is then smoothed, `down` (whose inputs are products) and the head
stay bfloat16, int4 is for up to 4 rows, and `auto` takes W8A8 for over 64 rows only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from kvmesh.engine.linear.bf16 import bf16
from kvmesh.engine.linear.by_rows import ByRows
from kvmesh.engine.linear.dense import Dense
from kvmesh.engine.linear.int4 import Int4, fits, on_grid
from kvmesh.engine.linear.interface import Linear
from kvmesh.engine.linear.native import NativeProduct, Products, products
from kvmesh.engine.linear.native_packing import fits as fits_native
from kvmesh.engine.linear.smooth import smooth_int8
from kvmesh.errors import InvalidArgument

Precision = Literal["float32", "bf16", "int8", "int4", "auto"]
PRECISIONS = ("float32", "bf16", "int8", "int4", "auto")
INT4_ROWS = 4
"""With more rows than this, reading bfloat16 weights costs less than unpacking int4 ones: 12 against 17 ms for 4 rows
of SmolLM2's layers on one Zen 4 core, 26 against 19 ms for 8."""

FEW_ROWS = 24
"""With more rows than this, int8 products of the native library are faster than int4 ones: 3.3 against 4.7 ms for 1 row
of SmolLM2's layers on one Zen 4 core, 12 against 12 ms for 16, 22 against 20 ms for 32."""

INT8_ROWS = 64
"""With no more rows than this, quantising activations costs what int8 saves: at 32 sequences bf16 decodes 519 tokens/s
and int8 443, but prompts are computed at 1,360 and 1,695 (bench/engine.py, two threads)."""

Pack = Callable[[Tensor, Tensor | None, Tensor | None], Linear]
"""(weight `[out, in]`, bias, magnitude that each input channel reaches or None) -> product."""


@dataclass(frozen=True, slots=True)
class Packing:
    """How a model's projections become products; `down` is the one that leaves a feed-forward.

    `dense` ones keep the tensors as they are loaded. `ranged` ones want to know how far activations reach.
    """

    layer: Pack
    down: Pack
    head: Pack
    dense: bool = False
    ranged: bool = False


def resolve_precision(precision: str | None, dtype: str, device: str = "cpu") -> str:
    """What is computed: on a CPU what is asked for; elsewhere, and if nothing is, weights have the dtype of everything
    else, so that workers on unlike devices have equal KV.

    Raises:
        InvalidArgument: no such precision, or one that this dtype or device does not have.
    """
    if precision not in (*PRECISIONS, None):
        raise InvalidArgument(f"the precision {precision!r} is not one of {', '.join(PRECISIONS)}")
    if device != "cpu" and precision in ("int8", "int4"):
        raise InvalidArgument(f"the precision {precision!r} needs a CPU, the device is {device}")
    if device != "cpu" or precision is None:
        return "bf16" if dtype == "bfloat16" else "float32"
    if precision != "float32" and dtype != "bfloat16":
        raise InvalidArgument(f"the precision {precision!r} needs the dtype bfloat16, not {dtype}")
    return precision


def packing_of(precision: str, device: str = "cpu", native: Callable[[], Products | None] = products) -> Packing:
    """The products of a resolved precision."""
    if device != "cpu" or precision == "float32":
        return Packing(_dense, _dense, _dense, dense=True)
    if (library := native()) and (library.integers or precision == "bf16"):
        return _native_packing(precision, library)
    if precision == "bf16":
        return Packing(_bf16, _bf16, _bf16)
    if precision == "int8":
        return Packing(smooth_int8, _bf16, _bf16, ranged=True)
    if precision == "auto":
        return Packing(_exact_int4_or(_bf16_or_int8), _exact_int4_or(_bf16), _bf16, ranged=True)
    return Packing(_int4_and_bf16, _int4_and_bf16, _bf16)


def _native_packing(precision: str, library: Products) -> Packing:
    def layer(weight: Tensor, bias: Tensor | None, ranges: Tensor | None) -> Linear:
        if not fits_native(weight):
            return bf16(weight, bias)
        if precision == "bf16":
            return NativeProduct(library, bf16=weight, bias=bias)
        grid = None if precision == "int8" else on_grid(weight)
        if precision == "int4":
            return NativeProduct(library, grid=grid, bias=bias)
        return NativeProduct(library, int8=weight, grid=grid if grid and grid.exact else None, few=FEW_ROWS, bias=bias)

    def head(weight: Tensor, bias: Tensor | None, ranges: Tensor | None) -> Linear:
        if not fits_native(weight):
            return bf16(weight, bias)
        if precision == "bf16":
            return NativeProduct(library, bf16=weight, bias=bias, wide=True)
        return NativeProduct(library, int8=weight, bias=bias, wide=True)

    return Packing(layer, layer, head)


def _dense(weight: Tensor, bias: Tensor | None, ranges: Tensor | None) -> Linear:
    return Dense(weight, bias)


def _bf16(weight: Tensor, bias: Tensor | None, ranges: Tensor | None) -> Linear:
    return bf16(weight, bias)


def _bf16_or_int8(weight: Tensor, bias: Tensor | None, ranges: Tensor | None) -> Linear:
    return ByRows(bf16(weight, bias), smooth_int8(weight, bias, ranges), INT8_ROWS)


def _int4_and_bf16(weight: Tensor, bias: Tensor | None, ranges: Tensor | None) -> Linear:
    if not fits(weight):
        return bf16(weight, bias)
    grid = on_grid(weight)
    return ByRows(Int4(grid, bias), bf16(grid.dequantised(), bias), INT4_ROWS)


def _exact_int4_or(many: Pack) -> Pack:
    """`many`, but for few rows int4 if the weight came from such a file."""

    def pack(weight: Tensor, bias: Tensor | None, ranges: Tensor | None) -> Linear:
        grid = on_grid(weight) if fits(weight) else None
        product = many(weight, bias, ranges)
        return ByRows(Int4(grid, bias), product, INT4_ROWS) if grid and grid.exact else product

    return pack
