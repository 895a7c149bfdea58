"""What a client may send by mistake or malice: its documented status at once, and nothing left behind."""

import asyncio

import grpc
import pytest
import pytest_asyncio

from kvmesh.cli.plan import MeshPlan
from kvmesh.client import AsyncClient
from kvmesh.errors import AlreadyExists, InvalidArgument, NotFound, Overloaded
from kvmesh.v1 import router_pb2
from tests.e2e.mesh import ProcessMesh, until

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

CONTEXT = 4096
SETTINGS = {"KVMESH_FAKE_STEP_SECONDS": "0.01", "KVMESH_MAX_CONCURRENT": "2", "KVMESH_MAX_QUEUED": "1"}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def mesh(tmp_path_factory):
    plan = MeshPlan("fake", port=0, settings=SETTINGS)
    async with ProcessMesh.running(plan, tmp_path_factory.mktemp("logs")) as mesh:
        yield mesh


async def refused(mesh, error, *arguments, **options):
    with pytest.raises(error) as caught:
        await asyncio.wait_for(_read(mesh.client.generate(*arguments, **options)), 5)
    await mesh.assert_clean()
    return caught.value


async def test_an_unknown_model_is_not_found_and_the_message_names_what_there_is(mesh):
    assert "fake" in str(await refused(mesh, NotFound, "hello", model="gpt-17"))


@pytest.mark.parametrize("given", [{"token_ids": []}, {"prompt": ""}, {"chat": []}])
async def test_an_empty_prompt(mesh, given):
    await refused(mesh, InvalidArgument, **given)


@pytest.mark.parametrize("given", [{"token_ids": [65] * CONTEXT}, {"prompt": "A" * (CONTEXT + 5)}])
async def test_a_prompt_longer_than_the_context(mesh, given):
    assert str(CONTEXT) in str(await refused(mesh, InvalidArgument, **given))


async def test_more_output_than_the_context_holds(mesh):
    assert "max_tokens" in str(await refused(mesh, InvalidArgument, "hello", max_tokens=CONTEXT))


async def test_every_bad_value_is_named_at_once(mesh):
    bad = {
        "temperature": -1.0,
        "top_p": 1.5,
        "min_p": float("nan"),
        "repetition_penalty": 0.0,
        "n": 1000,
        "logprobs": 99,
    }
    error = await refused(mesh, InvalidArgument, "hello", max_tokens=4, min_tokens=9, **bad)
    fields = " ".join(name for name, _ in error.violations)
    assert all(name in fields for name in (*bad, "min_tokens"))


async def test_tokens_outside_the_vocabulary(mesh):
    await refused(mesh, InvalidArgument, token_ids=[1, 2, 5000])


async def test_text_that_is_not_utf8(mesh):
    wire = router_pb2.GenerateStreamRequest(text="AAAA").SerializeToString().replace(b"AAAA", b"\xff\xfe\xc0\x80")
    assert await _status_of(mesh, wire) is grpc.StatusCode.INVALID_ARGUMENT
    await mesh.assert_clean()


async def test_bytes_that_are_no_message(mesh):
    assert await _status_of(mesh, b"\xff" * 40) is grpc.StatusCode.INVALID_ARGUMENT
    await mesh.assert_clean()


async def test_a_message_beyond_the_limit(mesh):
    wire = router_pb2.GenerateStreamRequest(text="A" * (9 << 20)).SerializeToString()
    assert await _status_of(mesh, wire) is grpc.StatusCode.RESOURCE_EXHAUSTED
    await mesh.assert_clean()


async def _status_of(mesh, wire):
    async with grpc.aio.insecure_channel(mesh.router.address) as channel:
        call = channel.unary_stream("/kvmesh.v1.InferenceService/GenerateStream")(wire, timeout=10)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
        return caught.value.code()


async def test_an_id_in_use_and_a_full_queue(mesh):
    running = [mesh.client.generate("hello", max_tokens=2000, request_id=f"r{number}") for number in range(3)]
    tasks = [asyncio.create_task(_read(stream)) for stream in running]
    await until(lambda: _load_is(mesh, 2, 1), 10)
    error = await _failure(mesh, request_id="r9")
    assert isinstance(error, Overloaded)
    assert error.retry_after > 0
    assert isinstance(await _failure(mesh, request_id="r0"), AlreadyExists | Overloaded)
    for stream in running:
        assert await stream.abort()
    await asyncio.gather(*tasks)
    await mesh.assert_clean()


async def _load_is(mesh, running, waiting):
    statistics = await mesh.statistics(mesh.router)
    return (statistics.running, statistics.waiting) == (running, waiting)


async def _read(stream):
    async with stream as events:
        async for _ in events:
            pass


async def _failure(mesh, **options):
    try:
        await _read(mesh.client.generate("hello", max_tokens=4, **options))
    except Exception as error:
        return error
    raise AssertionError("it was served")


async def test_a_client_that_stops_reading_holds_up_nobody(mesh):
    """It has its tokens buffered by the transport or is dropped; others are served meanwhile."""
    async with AsyncClient(mesh.router.address) as lazy:
        stream = lazy.generate("hello", max_tokens=3000, logprobs=20, ignore_eos=True)
        await anext(stream)
        async with asyncio.timeout(20):
            completion = await mesh.client.complete("other", max_tokens=8, ignore_eos=True)
        assert completion.finish.usage.completion_tokens == 8
    await mesh.assert_clean()
