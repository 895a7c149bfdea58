"""The router over real prefill, decode and kvstore services with fake models: the answer is that of one engine."""

import asyncio
from dataclasses import replace

import pytest

from kvmesh.types import Role
from kvmesh.v1 import common_pb2, router_pb2, router_pb2_grpc
from tests.integration.calls import GREEDY, prompt, undisturbed
from tests.integration.mesh import Mesh
from tests.integration.router_fakes import Answer, read, until

LONG = replace(GREEDY, max_tokens=400)


def stream(mesh, tokens, max_tokens=24):
    stub = router_pb2_grpc.InferenceServiceStub(mesh.channel("router-0"))
    request = router_pb2.GenerateStreamRequest(
        token_ids=router_pb2.TokenIds(ids=tokens),
        sampling=common_pb2.SamplingParameters(temperature=0),
        stopping=common_pb2.StoppingParameters(max_tokens=max_tokens),
    )
    return stub.GenerateStream(request, timeout=60)


@pytest.mark.parametrize("tokens", [1, 256, 700])
async def test_kv_travels_through_the_stores(tokens):
    async with Mesh(router=1) as mesh:
        got = await read(stream(mesh, prompt(tokens)))
        assert [got.tokens[0]] == undisturbed(prompt(tokens))
        assert (got.finish.usage.transferred_tokens, got.finish.recoveries) == (tokens, 0)
        assert got.finish.timings.prefill_seconds > 0
        await mesh.assert_clean()


async def test_a_killed_decode_is_recovered_from_and_a_restarted_one_serves_again():
    async with Mesh(router=1, decode=2, decode_settings={"fake_step_seconds": 0.002}) as mesh:
        reading = asyncio.create_task(read(stream(mesh, prompt(700), LONG.max_tokens), answer := Answer()))
        await until(lambda: len(answer.tokens.get(0, ())) > 20)
        busy = [name for name in ("decode-0", "decode-1") if (await mesh.statistics(name)).running]
        await mesh.kill(busy[0])
        await reading
        assert [answer.tokens[0]] == undisturbed(prompt(700), LONG)
        assert answer.finish.recoveries == 1
        assert answer.finish.decode_worker not in busy
        await mesh.restart(busy[0])
        await mesh.kill(answer.finish.decode_worker)
        got = await read(stream(mesh, prompt(700)))
        assert [got.tokens[0]] == undisturbed(prompt(700))
        await mesh.assert_clean()


async def test_status_sees_every_part():
    async with Mesh(router=1, prefill=2) as mesh:
        stub = router_pb2_grpc.MeshServiceStub(mesh.channel("router-0"))

        async def roles():
            reply = await stub.GetMeshStatus(router_pb2.GetMeshStatusRequest(check_integrity=True))
            assert not any(worker.error or worker.statistics.integrity_errors for worker in reply.workers)
            return sorted(worker.info.worker_id for worker in reply.workers)

        async with asyncio.timeout(10):
            while len(found := await roles()) < 5:  # noqa: ASYNC110  # The router polls the registry.
                await asyncio.sleep(0.05)
        assert found == ["decode-0", "kvstore-0", "prefill-0", "prefill-1", "router-0"]
        assert {part.role for part in mesh.parts.values()} == set(Role) - {Role.MIXED}
