"""A mesh whose workers read a power meter: the watts reach the router, which sheds low priority near its budget."""

import asyncio
from contextlib import asynccontextmanager, suppress

import grpc
import pytest

from kvmesh.v1 import common_pb2, router_pb2, router_pb2_grpc
from tests.integration.calls import prompt
from tests.integration.mesh import Mesh, eventually

TICK = 0.02
WATTS = 500.0


@pytest.fixture
def counter(tmp_path):
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    (zone / "max_energy_range_uj").write_text(str(2**40))
    (zone / "energy_uj").write_text("0")
    return zone / "energy_uj"


@asynccontextmanager
async def drawing(counter):
    """Half a kilowatt, for as long as the block runs."""

    async def draw():
        loop, began = asyncio.get_running_loop(), asyncio.get_running_loop().time()
        while True:
            fresh = counter.with_name("fresh")
            fresh.write_text(str(int((loop.time() - began) * WATTS * 1e6)))
            fresh.replace(counter)
            await asyncio.sleep(TICK)

    task = asyncio.create_task(draw())
    try:
        yield
    finally:
        task.cancel()


def generate(mesh, low_priority):
    stub = router_pb2_grpc.InferenceServiceStub(mesh.channel("router-0"))
    request = router_pb2.GenerateRequest(
        token_ids=router_pb2.TokenIds(ids=prompt(40)),
        sampling=common_pb2.SamplingParameters(temperature=0),
        stopping=common_pb2.StoppingParameters(max_tokens=24),
        low_priority=low_priority,
    )
    return stub.Generate(request, timeout=30)


async def test_low_priority_is_shed_near_the_budget(counter):
    worker = {"power_meter": "rapl", "powercap_path": counter.parents[1]}
    settings = {
        "prefill_settings": worker,
        "decode_settings": worker,
        "router_settings": {"power_budget": 0.95 * WATTS},
    }
    async with Mesh(router=1, **settings) as mesh:
        assert (await generate(mesh, low_priority=True)).finish.usage.completion_tokens == 24
        async with drawing(counter):
            reading = await mesh.until("decode-0", lambda statistics: statistics.power_watts > 0)
            assert reading.power_domain.endswith("/rapl")
            assert reading.energy_joules_total > 0

            async def shed():
                with suppress(grpc.aio.AioRpcError):
                    await generate(mesh, low_priority=True)
                    return False
                return True

            await eventually(shed)
            with pytest.raises(grpc.aio.AioRpcError, match="requests of low priority wait") as refused:
                await generate(mesh, low_priority=True)
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert (await generate(mesh, low_priority=False)).finish.usage.completion_tokens == 24
        await mesh.assert_clean()
