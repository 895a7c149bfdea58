"""A decode process: what `kvmesh.worker` runs, with the service of this package.

Reads no environment and handles no signal: `__main__` does. Tests enter `decode()` in their own event loop.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from kvmesh.rpc.server import Service
from kvmesh.types import Role
from kvmesh.v1.decode_pb2_grpc import add_DecodeServiceServicer_to_server
from kvmesh.worker.process import WorkerProcess, worker_process
from kvmesh.worker.worker import Worker
from kvmesh_decode.config import DecodeConfig
from kvmesh_decode.servicer import DecodeServicer


def decode(config: DecodeConfig) -> AbstractAsyncContextManager[WorkerProcess]:
    """A running decode worker that is registered, until the block is left.

    Raises:
        KvmeshError: it cannot start.
    """
    return worker_process(config, Role.DECODE, compose)


def compose(worker: Worker) -> Service:
    servicer = DecodeServicer(worker)
    return Service("kvmesh.v1.DecodeService", lambda server: add_DecodeServiceServicer_to_server(servicer, server))
