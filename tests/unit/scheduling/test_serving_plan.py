"""Plans: read with every fault named, followed in proportion to their flows, by whoever is there."""

import json
from collections import Counter

import pytest

from kvmesh.errors import InvalidArgument
from kvmesh.scheduling.phases import Phases
from kvmesh.scheduling.plan_weights import PlanWeights
from kvmesh.scheduling.policy import Prompt, identity
from kvmesh.scheduling.serving_plan import parse
from kvmesh.types import Role, WorkerInfo

DOCUMENT = {
    "algorithm": "kvmesh",
    "placement": {"a": [0, 80]},
    "phase": {"a": "prefill", "b": "prefill", "c": "decode", "d": "decode"},
    "links": [
        {"from": "source", "to": "a", "flow_tokens_per_s": 300.0, "capacity_tokens_per_s": 900},
        {"from": "source", "to": "b", "flow_tokens_per_s": 100.0},
        {"from": "a", "to": "c", "flow_tokens_per_s": 300.0},
        {"from": "b", "to": "d", "flow_tokens_per_s": 100.0},
        {"from": "c", "to": "sink", "flow_tokens_per_s": 300.0},
    ],
}
MESH = [WorkerInfo(name, 1, Role.MIXED, "", 1) for name in "abcd"]


def planned(document=DOCUMENT):
    policy = PlanWeights()
    policy.follow(parse(json.dumps(document)))
    return policy


def serve(policy, number, workers=MESH, avoid=()):
    prompt = Prompt(100, key=number)
    prefill = policy.prefill(workers, prompt, 0.0, avoid)
    decode = policy.decode(workers, 100, 1, 0.0, avoid, prompt=prompt, local=prefill is None)
    for one in filter(None, (prefill, decode)):
        one.finish(0.0)
    return prefill and prefill.worker.worker_id, decode.worker.worker_id


def test_work_follows_the_flows_from_prefill_to_decode():
    policy = planned()
    pairs = Counter(serve(policy, number) for number in range(400))
    assert pairs == {("a", "c"): 300, ("b", "d"): 100}


def test_what_replan_writes_is_followed_too():
    groups = [{"phase": phase, "workers": [name]} for name, phase in DOCUMENT["phase"].items()]
    routes = [{"prefill": 0, "decode": 2, "weight": 0.75}, {"prefill": 1, "decode": 3, "weight": 0.25}]
    policy = planned({"decisions": [], "groups": groups, "routes": routes})
    assert Counter(serve(policy, number) for number in range(400)) == {("a", "c"): 300, ("b", "d"): 100}


def test_whoever_is_left_takes_over():
    policy = planned()
    assert {serve(policy, n, avoid={identity(MESH[0])}) for n in range(5)} == {("b", "d")}
    assert {serve(policy, n, workers=MESH[1:3]) for n in range(5)} == {("b", "c")}
    assert {serve(policy, n, workers=MESH[:1]) for n in range(5)} == {("a", "a")}


def test_without_a_plan_load_is_balanced():
    policy = PlanWeights()
    assert len({serve(policy, number)[1] for number in range(8)}) == 4


def test_a_new_plan_changes_the_phases_at_once():
    policy = planned()
    assert serve(policy, 0)[0] == "a"
    flipped = DOCUMENT | {"phase": {"a": "decode", "b": "decode", "c": "prefill", "d": "decode"}, "links": []}
    policy.follow(parse(json.dumps(flipped)))
    assert {serve(policy, number)[0] for number in range(4)} == {"c"}


def test_workers_of_one_phase_cannot_be_turned():
    phases = Phases({"p": Role.DECODE, "d": Role.DECODE, "m": Role.PREFILL})
    mesh = [
        WorkerInfo(name, 1, role, "", 1)
        for name, role in zip("pdm", (Role.PREFILL, Role.DECODE, Role.MIXED), strict=True)
    ]
    assert [worker.worker_id for worker in phases.prefill(mesh)] == ["p", "m"]
    assert [worker.worker_id for worker in phases.decode(mesh)] == ["d"]
    assert phases.unmet(mesh) == ["p"]


def test_a_plan_that_leaves_nobody_to_decode_is_not_taken_literally():
    assert Phases({"a": Role.PREFILL}).decode(MESH[:1]) == MESH[:1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the plan is not JSON"),
        ("[]", "the plan is no plan"),
        ('{"links": []}', "it gives nobody a phase"),
        (
            '{"groups": [{"phase": "mixed", "workers": ["a"]}], "routes": [{"prefill": 0, "decode": 1}]}',
            "names group 1",
        ),
        ('{"phase": {}}', "it gives nobody a phase"),
        ('{"phase": {"a": "prefetch"}}', "prefetch is no phase"),
        ('{"phase": {"a": "mixed"}, "links": [{"from": "s", "to": "a", "flow_tokens_per_s": -1}]}', "links.0.flow"),
        ('{"phase": {"a": "mixed"}, "links": [{"from": "s", "to": "a", "flow_tokens_per_s": NaN}]}', "links.0.flow"),
    ],
)
def test_what_is_no_plan_is_refused_in_one_sentence(text, message):
    with pytest.raises(InvalidArgument, match=message):
        parse(text)
