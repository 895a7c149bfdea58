"""Every policy: whoever can serve is given work, charges come back, failed workers are the last resort."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmesh.errors import InvalidArgument
from kvmesh.scheduling.fleet import Fleet
from kvmesh.scheduling.phases import Phases
from kvmesh.scheduling.policies import NAMES, make_policy
from kvmesh.scheduling.policy import Decoded, Ended, Prefilled, Prompt, Served, Slo, Transferred, identity
from kvmesh.scheduling.prefix_index import prefix_hashes
from kvmesh.scheduling.splitwise import Splitwise
from kvmesh.types import Role, WorkerCapacity, WorkerInfo

ROLES = (Role.PREFILL, Role.DECODE, Role.MIXED)


def worker(number, role, blocks=4096):
    capacity = WorkerCapacity(blocks=blocks)
    return WorkerInfo(f"{role}-{number}", 1, role, f"h:{number}", 1, capacity=capacity)


def prompt_of(number, tokens, slo=None):
    hashes = prefix_hashes(range(number % 3, number % 3 + tokens))
    return Prompt(tokens, hashes, key=number, output_tokens=64, slo=slo or Slo())


meshes = st.lists(st.sampled_from(ROLES), min_size=1, max_size=6).map(
    lambda roles: [worker(number, role) for number, role in enumerate(roles)]
)
slos = st.sampled_from([Slo(), Slo(1.0, 0.05), Slo(30.0, 1.0), Slo(tpot=0.001)])


class Run:
    """A policy at work on a mesh, and the assignments that are out."""

    def __init__(self, name, mesh):
        self.policy, self.mesh = make_policy(name), mesh
        self.out, self.now = [], 0.0

    def serve(self, number, tokens, slo, avoid=()):
        """Starts one request; what was chosen for each phase."""
        self.now += 0.1
        prompt = prompt_of(number, tokens, slo)
        prefill = self.policy.prefill(self.mesh, prompt, self.now, avoid)
        if prefill is not None:
            prefill.first_token(self.now + 0.01)
        decode = self.policy.decode(self.mesh, tokens, 1, self.now, avoid, prompt=prompt, local=prefill is None)
        self.out += [(prompt, one) for one in (prefill, decode) if one is not None]
        return prefill, decode

    def end(self, number):
        prompt, one = self.out.pop(number % len(self.out))
        self.now += 0.05
        one.first_token(self.now)
        one.finish(self.now, 10.0)
        one.finish(self.now)
        for seen in (
            Prefilled(one.worker, prompt.tokens, 0, 0.01), Decoded(one.worker, 9, 0.02, 2.0, 500.0),
            Transferred(one.worker, prompt.tokens, 0.01), Served(prompt, one.worker, one.worker, 0.1, 0.02, 10),
        ):  # fmt: skip
            self.policy.observe(seen)


@pytest.mark.parametrize("name", NAMES)
@given(meshes, slos, st.lists(st.tuples(st.booleans(), st.integers(0, 99), st.integers(1, 3000)), max_size=40))
@settings(max_examples=25, deadline=None)
def test_whoever_can_serve_is_charged_and_all_of_it_comes_back(name, mesh, slo, steps):
    run = Run(name, mesh)
    able = any(one.role.decodes for one in mesh)
    for number, (ends, pick, tokens) in enumerate(steps):
        if ends and run.out:
            run.end(pick)
        else:
            prefill, decode = run.serve(number, tokens, slo)
            assert (decode is not None) == able
            assert prefill is None or prefill.worker.role.prefills
            assert decode is None or decode.worker.role.decodes
        assert run.policy.check_integrity() == []
        assert run.policy.assigned == len(run.out)
    while run.out:
        run.end(0)
    for number, _ in enumerate(steps):
        run.policy.observe(Ended(prompt_of(number, 1)))
    assert run.policy.check_integrity() == []
    assert run.policy.assigned == 0
    for memory in ("_paired", "_prefilled", "_pulled"):
        assert not getattr(run.policy, memory, ())


@pytest.mark.parametrize("name", NAMES)
@given(meshes, st.data())
@settings(max_examples=25, deadline=None)
def test_who_has_failed_is_the_last_resort(name, mesh, data):
    run = Run(name, mesh)
    for number in range(data.draw(st.integers(0, 6))):
        run.serve(number, 200, Slo())
    avoid = {identity(one) for one in data.draw(st.lists(st.sampled_from(mesh)))}
    prefill, decode = run.serve(99, 300, Slo(), avoid)
    for phase, chosen in (("prefills", prefill), ("decodes", decode)):
        if chosen is not None and identity(chosen.worker) in avoid:
            planned = [one for one in mesh if getattr(one.role, phase)]
            # A mixed worker may be out of the pool of this phase; nobody in it is left.
            pool = [one for one in planned if one.role is not Role.MIXED] or planned
            assert all(identity(one) in avoid for one in pool)


@pytest.mark.parametrize("name", NAMES)
def test_suspects_are_avoided_for_a_while(name):
    mesh = [worker(number, Role.DECODE) for number in range(3)]
    run = Run(name, mesh)
    run.policy.suspect(mesh[0], 0.0)
    chosen = {run.serve(number, 100, Slo())[1].worker.worker_id for number in range(9)}
    assert chosen == {"decode-1", "decode-2"}
    run.now = 60.0
    chosen = {run.serve(number, 100, Slo())[1].worker.worker_id for number in range(9)}
    assert "decode-0" in chosen


@pytest.mark.parametrize("name", NAMES)
def test_work_spreads_over_equal_workers(name):
    mesh = [worker(number, role) for number, role in enumerate([Role.PREFILL] * 2 + [Role.DECODE] * 2)]
    run = Run(name, mesh)
    pairs = [run.serve(number, 10, Slo()) for number in range(12)]  # Too short to share a block.
    assert len({decode.worker.worker_id for _, decode in pairs}) == 2
    assert name == "chunked" or len({prefill.worker.worker_id for prefill, _ in pairs if prefill}) == 2


@pytest.mark.parametrize("name", NAMES)
def test_workers_that_left_are_forgotten(name):
    mesh = [worker(0, Role.DECODE)]
    run = Run(name, mesh)
    run.serve(0, 100, Slo())
    run.policy.retain([])
    assert run.policy.assigned == 1
    run.end(0)
    run.policy.retain([])
    assert run.policy.check_integrity() == []


def test_chunked_leaves_every_prompt_to_the_decode_worker():
    run = Run("chunked", [worker(0, Role.PREFILL), worker(1, Role.DECODE), worker(2, Role.MIXED)])
    for number in range(4):
        prefill, decode = run.serve(number, 500, Slo())
        assert prefill is None
        assert decode.prompt_tokens > 0


def test_distserve_takes_the_shortest_queue_whatever_it_has_cached():
    policy, mesh = make_policy("distserve"), [worker(0, Role.PREFILL), worker(1, Role.PREFILL)]
    first = policy.prefill(mesh, prompt_of(0, 1000), 0.0)
    assert policy.prefill(mesh, prompt_of(0, 1000), 0.0).worker != first.worker


def test_a_prefix_attracts_until_its_worker_is_too_far_behind():
    policy, mesh = make_policy("prefix-aware"), [worker(0, Role.PREFILL), worker(1, Role.PREFILL)]
    first = policy.prefill(mesh, prompt_of(0, 3200), 0.0)
    first.finish(1.0)
    chosen = []
    for number in range(300):
        chosen.append(policy.prefill(mesh, Prompt(3200, prompt_of(0, 3200).hashes, key=number), 1.0).worker)
    assert chosen[0] == first.worker
    assert {one.worker_id for one in chosen} == {one.worker_id for one in mesh}


def test_splitwise_borrows_when_a_pool_is_full_and_gives_back():
    mesh = [worker(0, Role.MIXED), worker(1, Role.MIXED)]
    phases = Phases({"mixed-0": Role.PREFILL, "mixed-1": Role.DECODE})
    policy = Splitwise(Fleet(phases=phases), threshold=1000)
    first = policy.prefill(mesh, Prompt(1500, key="a"), 0.0)
    assert first.worker.worker_id == "mixed-0"
    borrowed = policy.prefill(mesh, Prompt(1500, key="b"), 0.0)
    assert borrowed.worker.worker_id == "mixed-1"
    assert [one.worker_id for one in policy.pools(mesh).mixed] == ["mixed-1"]
    borrowed.finish(1.0)
    assert policy.pools(mesh).mixed == []


def test_splitwise_picks_both_workers_together():
    policy = make_policy("splitwise")
    mesh = [worker(0, Role.PREFILL), worker(1, Role.DECODE), worker(2, Role.DECODE)]
    prompt = Prompt(100, key="a")
    policy.prefill(mesh, prompt, 0.0)
    policy.decode([mesh[1]], 5000, 1, 0.0, prompt=Prompt(5000, key="z"))
    picked = policy.decode(mesh, 100, 1, 0.0, prompt=prompt)
    assert picked.worker.worker_id == "decode-1"  # Picked before the other request came.


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(InvalidArgument, match=r"there is no policy 'fastest'; there is placement, distserve"):
        make_policy("fastest")
