"""The health probe of containers and of `kvmesh up`: `python -m kvmesh.rpc.probe host:port [service]`.

Exits 0 if the standard gRPC health service says SERVING, 1 otherwise. Knows no kvmesh service by name.
"""

from __future__ import annotations

import asyncio
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvmesh.rpc.options import CHANNEL_OPTIONS


async def serving(address: str, service: str = "", timeout: float = 3.0) -> bool:
    """True if `service` (default: the whole process) at host:port answers SERVING within `timeout` seconds."""
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            reply = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout)
        except grpc.aio.AioRpcError:
            return False
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def main(arguments: list[str]) -> int:
    if len(arguments) not in (1, 2):
        print("usage: python -m kvmesh.rpc.probe host:port [service]", file=sys.stderr)
        return 2
    address, service = (*arguments, "")[:2]
    return 0 if asyncio.run(serving(address, service)) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
