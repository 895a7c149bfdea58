"""Compiling numeric loops: numba, behind a typed door. Only modules that are imported lazily come here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., object])


def compiled(function: F) -> F:
    """Compiled on its first call, for the argument types of that call; runs without the GIL.

    Kept on disk, where there is a place to write to: in some containers there is none.
    """
    try:
        return cast(F, numba.njit(cache=True, nogil=True)(function))
    except RuntimeError:
        return cast(F, numba.njit(nogil=True)(function))
