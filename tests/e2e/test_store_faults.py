"""Three stores under load, one of them killed: no request fails, no token is wrong, nothing is left behind."""

import asyncio
import signal

import pytest

from kvmesh.cli.plan import MeshPlan
from kvmesh.engine.api import EngineRequest, TokenOutput
from kvmesh.engine.fake import fake_engine
from kvmesh.types import Role, SamplingParams
from tests.e2e.mesh import ProcessMesh, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(150)]

OUTPUT = 24
SETTINGS = {
    "KVMESH_FAKE_STEP_SECONDS": "0.01",
    "KVMESH_TOKEN_BUDGET": "256",
    "KVMESH_MAX_RUNNING": "4",
    "KVMESH_STALL_TIMEOUT": "5",
    "KVMESH_LEASE_TTL": "3",
    "KVMESH_REGISTRY_TTL": "2",
}


def prompt(number):
    """Five chunks and a tail; the first two are the same for every fourth."""
    return [(number % 4 + i * i) % 251 for i in range(512)] + [(number * 7 + i * 3) % 249 for i in range(800)]


def expected(number):
    engine = fake_engine()
    sampling = SamplingParams(max_tokens=OUTPUT, seed=5, ignore_eos=True)
    engine.add(EngineRequest("r", tuple(prompt(number)), sampling))
    output = []
    while engine.has_work():
        output += [event.token_id for event in engine.step() if isinstance(event, TokenOutput)]
    return output


async def ask(mesh, number):
    """Fails if the request does."""
    return await mesh.client.complete(token_ids=prompt(number), max_tokens=OUTPUT, seed=5, ignore_eos=True, timeout=60)


async def chunks_stored(mesh):
    return sum([(await mesh.statistics(info)).chunks for info in mesh.of(Role.KVSTORE)])


@pytest.mark.parametrize("replicas", [1, 2])
async def test_one_of_three_stores_is_killed_under_load(tmp_path, replicas):
    settings = {**SETTINGS, "KVMESH_REPLICAS": str(replicas)}
    plan = MeshPlan("fake", prefill=2, decode=2, kvstore=3, port=0, settings=settings)
    async with ProcessMesh.running(plan, tmp_path) as mesh:
        warm = await asyncio.gather(*(ask(mesh, i) for i in range(4)))
        during = [asyncio.create_task(ask(mesh, i)) for i in range(4, 16)]
        before = await chunks_stored(mesh)
        await until(lambda: _more_than(mesh, before + 4 * replicas), 30)
        assert not all(task.done() for task in during)
        mesh.send("kvstore-1", signal.SIGKILL)
        answers = [*warm, *await asyncio.gather(*during)]
        answers += await asyncio.gather(*(ask(mesh, i) for i in range(16)))
        for i, answer in enumerate(answers):
            assert list(answer.outputs[0].token_ids) == expected(i % 16)
        if replicas > 1:
            assert sum(answer.finish.usage.recomputed_tokens for answer in answers) == 0
        await mesh.heal()
        await mesh.assert_clean()
        again = await asyncio.gather(*(ask(mesh, i) for i in range(16)))
        assert [list(answer.outputs[0].token_ids) for answer in again] == [expected(i) for i in range(16)]
        await mesh.assert_clean()


async def _more_than(mesh, chunks):
    return await chunks_stored(mesh) > chunks


async def _knows_not(mesh, worker_id):
    return worker_id not in {worker.info.worker_id for worker in await mesh.client.status()}


async def test_a_store_that_joins_under_load_costs_nothing(tmp_path):
    plan = MeshPlan("fake", prefill=1, decode=1, kvstore=3, port=0, settings=SETTINGS)
    async with ProcessMesh.running(plan, tmp_path) as mesh:
        mesh.send("kvstore-2", signal.SIGTERM)
        await until(lambda: _knows_not(mesh, "kvstore-2"), 20)
        await until(lambda: asyncio.sleep(0, mesh.exit_status("kvstore-2") is not None), 20)
        before = await asyncio.gather(*(ask(mesh, i) for i in range(6)))
        during = [asyncio.create_task(ask(mesh, i)) for i in range(6)]
        await mesh.heal()
        after = await asyncio.gather(*during, *(ask(mesh, i) for i in range(6)))
        for i, answer in enumerate([*before, *after]):
            assert list(answer.outputs[0].token_ids) == expected(i % 6)
            assert answer.finish.usage.recomputed_tokens == 0
        await mesh.assert_clean()
