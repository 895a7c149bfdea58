"""SIGKILL and SIGSTOP of each service at each phase of a request: no token lost, none repeated, nothing left behind.

The model is the fake one, whose tokens depend on every KV entry of their context, so recovery from the wrong KV shows.
The oracle is the same model run alone. Two processes of each kind serve; one of them is hurt.
"""

import asyncio
import signal

import pytest
import pytest_asyncio

from kvmesh.cli.plan import MeshPlan
from kvmesh.client import Delta, Finish
from kvmesh.engine.api import EngineRequest, TokenOutput
from kvmesh.engine.fake import fake_engine
from kvmesh.types import FinishReason, Role, SamplingParams
from tests.e2e.mesh import ProcessMesh, until

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

OUTPUT = 40
SETTINGS = {
    "KVMESH_FAKE_STEP_SECONDS": "0.02",
    "KVMESH_TOKEN_BUDGET": "64",
    "KVMESH_MAX_RUNNING": "1",
    "KVMESH_STALL_TIMEOUT": "1.5",
    "KVMESH_LEASE_TTL": "3",
    "KVMESH_REGISTRY_TTL": "2",
}
PHASES = ("queued", "prefilling", "publishing", "handed over", "fetching", "decoding")
SERVICES = (Role.PREFILL, Role.DECODE, Role.KVSTORE)
# Where the loss must show in the reply, lest a test pass because the fault came too late.
FELT_AS_RECOVERY = {(Role.PREFILL, "prefilling"), (Role.PREFILL, "publishing"), (Role.DECODE, "decoding")}
FELT_AS_RECOMPUTATION = {(Role.KVSTORE, "publishing")}
salt = iter(range(10**6))


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def hurt_mesh(tmp_path_factory):
    plan = MeshPlan("fake", prefill=2, decode=2, kvstore=2, port=0, settings=SETTINGS)
    async with ProcessMesh.running(plan, tmp_path_factory.mktemp("logs")) as mesh:
        yield mesh


@pytest_asyncio.fixture(loop_scope="module")
async def mesh(hurt_mesh):
    """Whole again for each test, whatever became of the one before."""
    await hurt_mesh.heal()
    return hurt_mesh


def prompt(number):
    """600 tokens: two full chunks and a tail; new ones each time, so that nothing is cached."""
    return [(number * 7 + position * position) % 251 for position in range(600)]


def expected(tokens, output_tokens=OUTPUT):
    engine = fake_engine()
    engine.add(EngineRequest("r", tuple(tokens), SamplingParams(max_tokens=output_tokens, seed=5, ignore_eos=True)))
    output = []
    while engine.has_work():
        output += [event.token_id for event in engine.step() if isinstance(event, TokenOutput)]
    return output


class Stream:
    """One request of the client, running in the background."""

    def __init__(self, mesh, number, output_tokens=OUTPUT):
        self.prompt = prompt(number)
        self.tokens, self.finish = [], None
        self.generation = mesh.client.generate(
            token_ids=self.prompt, max_tokens=output_tokens, seed=5, ignore_eos=True, timeout=60
        )
        self.task = asyncio.create_task(self._read())

    async def _read(self):
        async with self.generation as events:
            async for event in events:
                if isinstance(event, Delta):
                    self.tokens += event.token_ids
                    assert event.token_offset == len(self.tokens)
                elif isinstance(event, Finish):
                    self.finish = event


class Moment:
    """Brings requests to a phase."""

    def __init__(self, mesh, output_tokens=OUTPUT):
        self.mesh = mesh
        self.output_tokens = output_tokens
        self.frozen = None
        self.streams = []

    async def reach(self, phase):
        """A busy machine may look too late and find the requests done: then with new ones."""
        for _ in range(5):
            await self._approach(phase)
            if not all(stream.task.done() for stream in self.streams):
                return
            self.thaw()
        raise AssertionError(f"five times over, the requests ended before they were seen {phase}")

    async def _approach(self, phase):
        self.baseline = sum([(await self.mesh.statistics(info)).chunks for info in self.mesh.of(Role.KVSTORE)])
        if phase == "fetching":
            await self._freeze_stores_before_fetching()
            return
        # One of each kind runs at a time: the third and fourth wait, at prefill and then at decode.
        count = 4 if phase in ("queued", "handed over") else 1
        self.streams = [Stream(self.mesh, next(salt), self.output_tokens) for _ in range(count)]
        await until(lambda: self._is_or_over(phase), 30)

    async def _is_or_over(self, phase):
        return await self._is(phase) or all(stream.task.done() for stream in self.streams)

    async def _is(self, phase):
        mesh = self.mesh
        if phase == "queued":
            return await mesh.find(Role.PREFILL, lambda s: s.waiting > 0)
        if phase == "handed over":
            return await mesh.find(Role.DECODE, lambda s: s.waiting > 0)
        if phase == "decoding":
            return len(self.streams[0].tokens) >= 5
        prefilling = await mesh.find(Role.PREFILL, lambda s: s.running > 0)
        stored = sum([(await mesh.statistics(info)).chunks for info in mesh.of(Role.KVSTORE)]) - self.baseline
        return prefilling and (stored > 0 if phase == "publishing" else True)

    async def _freeze_stores_before_fetching(self):
        """A request waits for a busy decode worker; its fetch from frozen stores lasts."""
        self.streams = [Stream(self.mesh, next(salt)) for _ in range(3)]
        await until(lambda: self._is_or_over("handed over"), 30)
        self.frozen = [info.worker_id for info in self.mesh.of(Role.KVSTORE)]
        for worker_id in self.frozen:
            self.mesh.send(worker_id, signal.SIGSTOP)
        await until(lambda: self._fetching(), 20)

    async def _fetching(self):
        busy = [await self.mesh.statistics(info) for info in self.mesh.of(Role.DECODE)]
        return any(stream.task.done() for stream in self.streams) or all(s.waiting == 0 for s in busy)

    def thaw(self, but=None):
        for worker_id in self.frozen or ():
            if worker_id != but:
                self.mesh.send(worker_id, signal.SIGCONT)
        self.frozen = None

    async def victim(self, role):
        """The process of the role that has work, else the first."""
        if self.frozen and role is Role.KVSTORE:
            return self.frozen[0]
        busy = await self.mesh.find(role, lambda s: s.running + s.waiting + s.leases > 0)
        return (busy or self.mesh.of(role)[0]).worker_id


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("role", SERVICES)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_the_loss_of_a_process_costs_no_token(mesh, number, role, phase):
    moment = Moment(mesh)
    await moment.reach(phase)
    victim = await moment.victim(role)
    mesh.send(victim, number)
    moment.thaw(but=victim)
    await asyncio.gather(*(stream.task for stream in moment.streams))
    for stream in moment.streams:
        assert stream.tokens == expected(stream.prompt)
        assert [choice.reason for choice in stream.finish.choices] == [FinishReason.LENGTH]
    if (role, phase) in FELT_AS_RECOVERY:
        assert sum(stream.finish.recoveries for stream in moment.streams) > 0
    if (role, phase) in FELT_AS_RECOMPUTATION:
        assert sum(stream.finish.usage.recomputed_tokens for stream in moment.streams) > 0
    await mesh.heal()
    await mesh.assert_clean()


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("how", ["cancel", "abort"])
async def test_a_client_that_leaves_frees_everything(mesh, how, phase):
    moment = Moment(mesh)
    await moment.reach(phase)
    for stream in moment.streams:
        if how == "cancel":
            stream.task.cancel()
        else:
            await stream.generation.abort()
    moment.thaw()
    await asyncio.gather(*(stream.task for stream in moment.streams), return_exceptions=True)
    if how == "abort":
        for stream in moment.streams:
            reasons = [choice.reason for choice in stream.finish.choices]
            assert reasons in ([FinishReason.ABORTED], [FinishReason.LENGTH])
            assert stream.tokens == expected(stream.prompt)[: len(stream.tokens)]
    await mesh.heal()
    await mesh.assert_clean()


async def test_the_mesh_serves_on_without_redis_and_registers_again(mesh):
    before = Stream(mesh, next(salt))
    await until(lambda: asyncio.sleep(0, len(before.tokens) > 2), 20)

    async def while_away():
        during = Stream(mesh, next(salt))
        await asyncio.gather(before.task, during.task)
        assert before.tokens == expected(before.prompt)
        assert during.tokens == expected(during.prompt)

    await mesh.restart_redis(while_away)
    await mesh.ready()
    after = Stream(mesh, next(salt))
    await after.task
    assert after.tokens == expected(after.prompt)
    await mesh.assert_clean()


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE, Role.KVSTORE])
async def test_a_worker_told_to_end_first_ends_what_it_began(mesh, role):
    """SIGTERM is a drain: no request is moved elsewhere, none is recomputed."""
    moment = Moment(mesh, output_tokens=200)  # the router sees within a second that the worker has left the registry
    await moment.reach("decoding" if role is Role.DECODE else "publishing")
    victim = await moment.victim(role)
    mesh.send(victim, signal.SIGTERM)
    (stream,) = moment.streams
    await stream.task
    assert stream.tokens == expected(stream.prompt, 200)
    if role is not Role.KVSTORE:
        assert stream.finish.recoveries == 0
    await until(lambda: asyncio.sleep(0, mesh.exit_status(victim) is not None), 20)
    assert mesh.exit_status(victim) == 0
    await mesh.heal()
    await mesh.assert_clean()
