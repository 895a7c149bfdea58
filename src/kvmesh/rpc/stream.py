"""Calls that end when their caller is done with them, and that fail with a `KvmeshError`.

An abandoned stream is cancelled explicitly: grpcio >= 1.83 leaves it running, and the peer would compute for nobody.
The call itself is handed out, so that reading a message passes through no layer of ours.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Protocol, TypeVar

import grpc.aio

from kvmesh.rpc.status import from_rpc_error


class Cancellable(Protocol):
    def cancel(self) -> bool: ...


Call = TypeVar("Call", bound=Cancellable)
Response_co = TypeVar("Response_co", covariant=True)


class AwaitableCall(Cancellable, Awaitable[Response_co], Protocol[Response_co]):
    """A unary or stream-unary call of grpc.aio."""


@asynccontextmanager
async def stream(call: Call) -> AsyncIterator[Call]:
    """`async with stream(stub.Decode(request, timeout=…)) as call: async for message in call: …`

    Raises:
        KvmeshError: in place of any AioRpcError that leaves the block.
    """
    try:
        yield call
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error
    finally:
        call.cancel()


async def unary(call: AwaitableCall[Response_co]) -> Response_co:
    """`response = await unary(stub.Abort(request, timeout=…))`

    Raises:
        KvmeshError: in place of any AioRpcError.
    """
    async with stream(call):
        return await call
