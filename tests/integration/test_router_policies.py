"""Every policy through a real router: right tokens, phases as told, early rejection, and nothing left behind."""

import asyncio
import json

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from kvmesh.process.config import read as read_config
from kvmesh.scheduling.policies import NAMES
from kvmesh.scheduling.policy import Decoded, Prefilled
from kvmesh.types import Role
from kvmesh.v1 import common_pb2, router_pb2, router_pb2_grpc
from kvmesh_router.config import RouterConfig
from tests.integration.calls import prompt, undisturbed
from tests.integration.mesh import Mesh, eventually
from tests.integration.router_fakes import ANSWER, RouterMesh, decode_well, freeze, prefill_well, read, until


def stream(mesh, tokens, **fields):
    stub = router_pb2_grpc.InferenceServiceStub(mesh.channel("router-0"))
    request = router_pb2.GenerateStreamRequest(
        token_ids=router_pb2.TokenIds(ids=tokens),
        sampling=common_pb2.SamplingParameters(temperature=0),
        stopping=common_pb2.StoppingParameters(max_tokens=24),
        **fields,
    )
    return stub.GenerateStream(request, timeout=60)


@pytest.mark.parametrize("policy", NAMES)
async def test_tokens_are_right_under_every_policy(policy):
    async with Mesh(router=1, prefill=2, decode=2, router_settings={"policy": policy}) as mesh:
        prompts = [prompt(tokens) for tokens in (5, 300, 700, 300)]
        answers = await asyncio.gather(*(read(stream(mesh, tokens)) for tokens in prompts))
        assert [[answer.tokens[0]] for answer in answers] == [undisturbed(tokens) for tokens in prompts]
        assert all(bool(answer.finish.prefill_worker) != (policy == "chunked") for answer in answers)
        await mesh.assert_clean()


@pytest.mark.parametrize("policy", ["placement", "chunked", "hybrid", "splitwise", "ucb"])
async def test_mixed_workers_serve_both_phases(policy):
    pytest.importorskip("kvmesh_mixed", reason="services/mixed is not on the path")
    async with Mesh(router=1, prefill=0, decode=0, mixed=2, router_settings={"policy": policy}) as mesh:
        prompts = [prompt(tokens) for tokens in (5, 300, 700)]
        answers = await asyncio.gather(*(read(stream(mesh, tokens)) for tokens in prompts))
        assert [[answer.tokens[0]] for answer in answers] == [undisturbed(tokens) for tokens in prompts]
        await mesh.assert_clean()


async def test_a_plan_flips_phases_of_running_workers(tmp_path):
    pytest.importorskip("kvmesh_mixed", reason="services/mixed is not on the path")
    plan = tmp_path / "plan.json"

    def write(prefill, decode):
        plan.write_text(json.dumps({"phase": {prefill: "prefill", decode: "decode"}, "note": prefill}))

    write("mixed-0", "mixed-1")
    settings = {"policy": "plan", "plan": str(plan)}
    async with Mesh(router=1, prefill=0, decode=0, mixed=2, router_settings=settings) as mesh:

        async def served():
            answer = await read(stream(mesh, prompt(300)))
            assert [answer.tokens[0]] == undisturbed(prompt(300))
            return answer.finish.prefill_worker, answer.finish.decode_worker

        assert await served() == ("mixed-0", "mixed-1")
        write("mixed-1", "mixed-0")
        flipped = ("mixed-1", "mixed-0")

        async def has_flipped():
            return await served() == flipped

        await eventually(has_flipped)
        plan.write_text("{")
        await mesh["router-0"].process.flow.directory.wait_for_change(1.5)
        assert await served() == flipped
        await mesh.assert_clean()


def retry_delay(error):
    for detail in rpc_status.from_call(error).details:
        info = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            return info.retry_delay.ToTimedelta().total_seconds()
    raise AssertionError("no RetryInfo")


async def test_at_overload_a_request_is_refused_before_it_costs_anything():
    async with RouterMesh(ttft_slo=0.5, tpot_slo=10.0, stall_timeout=30) as mesh:
        prefill, _ = await mesh.add(Role.PREFILL, prefill_well), await mesh.add(Role.DECODE, decode_well)
        assert (await mesh.generate("x" * 600)).text == ANSWER
        flow = mesh.router.flow
        for tokens in range(100, 4000, 100):  # A worker of a millisecond for each token.
            flow.policy.observe(Prefilled(prefill.info, tokens, 0, tokens * 1e-3))
        prefill.script = freeze
        stuck = asyncio.create_task(read(mesh.stream("y" * 400, request_id="stuck")))
        await until(lambda: prefill.running == 1)
        with pytest.raises(grpc.aio.AioRpcError, match="the first token would come after") as caught:
            await mesh.generate("z" * 400)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert retry_delay(caught.value) > 0
        assert len(prefill.requests) == 2
        patient = router_pb2.Objectives(ttft_seconds=60)
        other = asyncio.create_task(read(mesh.stream("z" * 400, request_id="other", objectives=patient)))
        await until(lambda: len(prefill.requests) == 3)
        for request_id, task in (("stuck", stuck), ("other", other)):
            await mesh.inference.Abort(router_pb2.AbortRequest(request_id=request_id))
            await task
        await mesh.settle()


async def test_slow_decode_is_refused_too():
    async with RouterMesh(tpot_slo=0.02) as mesh:
        decode = await mesh.add(Role.DECODE, decode_well)
        for batch in range(1, 60):
            mesh.router.flow.policy.observe(Decoded(decode.info, 10, 0.1 + batch * 1e-3, batch, batch * 100.0))
        with pytest.raises(grpc.aio.AioRpcError, match="a token would take") as caught:
            await mesh.generate()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert decode.requests == []
        await mesh.settle()


async def test_objectives_must_be_positive():
    async with RouterMesh() as mesh:
        await mesh.add(Role.DECODE, decode_well)
        with pytest.raises(grpc.aio.AioRpcError, match=r"objectives\.tpot_seconds must be > 0") as caught:
            await mesh.generate(objectives=router_pb2.Objectives(tpot_seconds=-1))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_what_workers_measure_reaches_the_policy():
    async with RouterMesh() as mesh:
        prefill, decode = await mesh.add(Role.PREFILL, prefill_well), await mesh.add(Role.DECODE, decode_well)
        for _ in range(3):
            await mesh.generate("x" * 600)
        fleet = mesh.router.flow.policy.fleet
        assert fleet.times(prefill.info).prefill.line.measured == 3
        assert fleet.times(decode.info).step.line.measured == 3
        await mesh.settle()


def test_a_policy_that_does_not_exist_ends_the_router_with_one_sentence(monkeypatch, capsys):
    monkeypatch.setenv("KVMESH_POLICY", "fastest")
    with pytest.raises(SystemExit):
        read_config(RouterConfig)
    assert "KVMESH_POLICY: Value error, there is no policy 'fastest'; there is placement" in capsys.readouterr().err
