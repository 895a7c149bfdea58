"""A mixed process: one worker that serves both phases, so that schedulers may change its part between two requests.

Composes the other two services and adds nothing. Reads no environment and handles no signal: `__main__` does.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

import kvmesh_decode.process
import kvmesh_prefill.process
from kvmesh.types import Role
from kvmesh.worker.process import WorkerProcess, worker_process
from kvmesh_mixed.config import MixedConfig


def mixed(config: MixedConfig) -> AbstractAsyncContextManager[WorkerProcess]:
    """A running worker that is registered, until the block is left.

    Raises:
        KvmeshError: it cannot start.
    """
    return worker_process(config, Role.MIXED, kvmesh_prefill.process.compose, kvmesh_decode.process.compose)
