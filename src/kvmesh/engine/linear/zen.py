"""Prepacked bfloat16 and int8 products by AMD's zentorch, where that optional package is installed and fits.

Only its library of operators is loaded: importing the package itself would change torch's compiler and takes seconds.
The operators' signatures are no stable interface, so the one release that was measured is accepted and no other.
"""

from __future__ import annotations

from functools import cache
from importlib import metadata, util
from pathlib import Path

import torch
from torch import Tensor

VERSION = "2.13.0.2"
TORCH = "2.13."


def usable(version: str | None, torch_version: str) -> bool:
    """True for the release that was measured, beside the torch that it was built for."""
    return version == VERSION and torch_version.startswith(TORCH)


@cache
def available() -> bool:
    """True once the operators are loaded, which needs a CPU with AVX-512."""
    package = util.find_spec("zentorch")
    if package is None or package.origin is None or not torch.cpu._is_avx512_supported():
        return False
    if not usable(_installed(), torch.__version__):
        return False
    try:
        torch.ops.load_library(Path(package.origin).with_name("libzentorch.so"))  # type: ignore[no-untyped-call]
    except OSError:
        return False
    return True


def _installed() -> str | None:
    try:
        return metadata.version("zentorch")
    except metadata.PackageNotFoundError:
        return None


class ZenBf16:
    """Weights in bfloat16, reordered once into the blocks that the kernel reads."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight = torch.ops.zentorch.zentorch_weight_prepack_for_linear(weight.bfloat16())
        self._bias = None if bias is None else bias.bfloat16()
        self._multiply = torch.ops.zentorch.zentorch_linear_unary.default

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self._multiply(x, self._weight, self._bias, is_weight_prepacked=True)
        return out


class ZenInt8:
    """W8A8: a scale per output channel, and one per row of `x` found as it comes."""

    def __init__(self, quantised: Tensor, scales: Tensor, bias: Tensor | None = None) -> None:
        self._weight = torch.ops.zentorch.zentorch_weight_prepack_for_dynamic_qlinear(quantised)
        self._scales = scales
        self._bias = None if bias is None else bias.bfloat16()
        self._multiply = torch.ops.zentorch.zentorch_dynamic_qlinear.default

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self._multiply(x, self._weight, self._scales, self._bias, is_weight_prepacked=True)
        return out
