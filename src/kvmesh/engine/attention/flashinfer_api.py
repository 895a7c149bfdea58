"""What kvmesh asks of the module `flashinfer`, and how it is found. Signatures are those of flashinfer-python 0.6.6.

Whoever has the module passes it on: nothing else imports it. Its log-sum-exps are to base 2.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol

from kvmesh.engine.attention.native_build import CannotBuild


class FlashInfer(Protocol):
    """The names that are used. A wrapper is planned once for all layers of a batch, then run for each."""

    BatchDecodeWithPagedKVCacheWrapper: Any
    BatchPrefillWithPagedKVCacheWrapper: Any
    BatchMLAPagedAttentionWrapper: Any
    append_paged_kv_cache: Any
    append_paged_mla_kv_cache: Any
    merge_state: Any


def import_flashinfer() -> FlashInfer:
    """The module.

    Raises:
        CannotBuild: it is not installed, or fails to import, as some versions do with other versions of torch.
    """
    try:
        module: Any = importlib.import_module("flashinfer")
    except Exception as error:
        raise CannotBuild(f"flashinfer cannot be imported: {error}") from error
    return module  # type: ignore[no-any-return]
