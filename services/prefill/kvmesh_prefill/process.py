"""A prefill process: what `kvmesh.worker` runs, with the service of this package.

Reads no environment and handles no signal: `__main__` does. Tests enter `prefill()` in their own event loop.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from kvmesh.rpc.server import Service
from kvmesh.types import Role
from kvmesh.v1.prefill_pb2_grpc import add_PrefillServiceServicer_to_server
from kvmesh.worker.process import WorkerProcess, worker_process
from kvmesh.worker.worker import Worker
from kvmesh_prefill.config import PrefillConfig
from kvmesh_prefill.servicer import PrefillServicer


def prefill(config: PrefillConfig) -> AbstractAsyncContextManager[WorkerProcess]:
    """A running prefill worker that is registered, until the block is left.

    Raises:
        KvmeshError: it cannot start.
    """
    return worker_process(config, Role.PREFILL, compose)


def compose(worker: Worker) -> Service:
    servicer = PrefillServicer(worker)
    return Service("kvmesh.v1.PrefillService", lambda server: add_PrefillServiceServicer_to_server(servicer, server))
