"""A mesh whose workers encode KV: it travels smaller, and workers that were set otherwise never take it for theirs."""

import grpc.aio
import pytest

from kvmesh.v1 import common_pb2, router_pb2, router_pb2_grpc
from tests.integration.calls import prompt
from tests.integration.mesh import Mesh
from tests.integration.router_fakes import read

TOKENS = 512


def ask(mesh, tokens=TOKENS):
    stub = router_pb2_grpc.InferenceServiceStub(mesh.channel("router-0"))
    request = router_pb2.GenerateStreamRequest(
        token_ids=router_pb2.TokenIds(ids=prompt(tokens)),
        sampling=common_pb2.SamplingParameters(temperature=0),
        stopping=common_pb2.StoppingParameters(max_tokens=8),
    )
    return stub.GenerateStream(request, timeout=60)


async def stored_bytes(codec):
    """What the store holds of one prompt; its KV must have travelled."""
    settings = {"codec": codec}
    async with Mesh(router=1, prefill_settings=settings, decode_settings=settings) as mesh:
        got = await read(ask(mesh))
        assert (got.finish.usage.transferred_tokens, got.finish.recoveries) == (TOKENS, 0)
        await mesh.assert_clean()
        return (await mesh.statistics("kvstore-0")).memory_bytes


async def test_kv_travels_encoded():
    raw, int8 = await stored_bytes("raw"), await stored_bytes("int8")
    assert 0 < int8 < raw / 3


async def test_workers_that_were_set_otherwise_do_not_pair():
    async with Mesh(router=1, prefill_settings={"codec": "int8"}) as mesh:
        with pytest.raises(grpc.aio.AioRpcError, match="differ in codec"):
            await read(ask(mesh))
        await mesh.assert_clean()
