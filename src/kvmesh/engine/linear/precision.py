"""From the name of a precision to the products that hold it. Knows how good and fast they are, by measurement;
measures nothing.

| precision | layers                                              | activations and KV |
|-----------|-----------------------------------------------------|--------------------|
| float32   | dense, in the dtype asked for                       | that dtype         |
| bf16      | prepacked bfloat16                                  | bfloat16           |
| int8      | W8A8                                                | bfloat16           |
| int4      | int4 up to 4 rows, bf16 for more                    | bfloat16           |
| auto      | as int4 where int4 loses nothing, as bf16 elsewhere | bfloat16           |

The head is bfloat16 in all but float32. Plain W8A8 is fast and no part of `auto`: outliers in activations make it cost
SmolLM2 1.6 % of perplexity in the head alone, as much in qkv, 1.5 % in down, 0.7 % in gate and up (on three of the
windows of bench/quality.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from kvmesh.engine.linear.bf16 import bf16
from kvmesh.engine.linear.by_rows import ByRows
from kvmesh.engine.linear.dense import Dense
from kvmesh.engine.linear.int4 import Grid, Int4, fits, on_grid
from kvmesh.engine.linear.int8 import int8
from kvmesh.engine.linear.interface import Linear
from kvmesh.errors import InvalidArgument

Precision = Literal["float32", "bf16", "int8", "int4", "auto"]
PRECISIONS = ("float32", "bf16", "int8", "int4", "auto")
INT4_ROWS = 4
"""With more rows than this, reading bfloat16 weights costs less than unpacking int4 ones: 12 against 17 ms for 4 rows
of SmolLM2's layers on one Zen 4 core, 26 against 19 ms for 8."""

Pack = Callable[[Tensor, Tensor | None], Linear]


@dataclass(frozen=True, slots=True)
class Packing:
    """How a model's projections and its head become products; `dense` ones keep the tensors as they are loaded."""

    layer: Pack
    head: Pack
    dense: bool = False


def resolve_precision(precision: str, dtype: str, device: str = "cpu") -> str:
    """What is computed: on a CPU what is asked for; elsewhere weights have the dtype of everything else.

    Raises:
        InvalidArgument: no such precision, or one that this dtype or device does not have.
    """
    if precision not in PRECISIONS:
        raise InvalidArgument(f"the precision {precision!r} is not one of {', '.join(PRECISIONS)}")
    if device != "cpu":
        if precision in ("int8", "int4"):
            raise InvalidArgument(f"the precision {precision!r} needs a CPU, the device is {device}")
        return "float32" if dtype == "float32" else "bf16"
    if precision != "float32" and dtype != "bfloat16":
        raise InvalidArgument(f"the precision {precision!r} needs the dtype bfloat16, not {dtype}")
    return precision


def packing_of(precision: str, device: str = "cpu") -> Packing:
    """The products of a resolved precision."""
    if device != "cpu" or precision == "float32":
        return Packing(Dense, Dense, dense=True)
    layer = {"bf16": bf16, "int8": int8, "int4": _int4_and_bf16, "auto": _exact_int4_and_bf16}[precision]
    return Packing(layer, bf16)


def _int4_and_bf16(weight: Tensor, bias: Tensor | None) -> Linear:
    return _both(on_grid(weight), bias) if fits(weight) else bf16(weight, bias)


def _exact_int4_and_bf16(weight: Tensor, bias: Tensor | None) -> Linear:
    grid = on_grid(weight) if fits(weight) else None
    return bf16(weight, bias) if grid is None or not grid.exact else _both(grid, bias)


def _both(grid: Grid, bias: Tensor | None) -> Linear:
    return ByRows(Int4(grid, bias), bf16(grid.dequantised(), bias), INT4_ROWS)
