"""`kvmesh replan`, and the commands around plans of groups: light changes without moving weights, and bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings

from kvmesh.cli.main import execute
from kvmesh.errors import InvalidArgument
from kvmesh.planner import catalogue
from kvmesh.planner.algorithms import arrange
from kvmesh.planner.groups.judge import check, node_flow
from kvmesh.planner.groups.lending import lent, missing, together
from kvmesh.planner.groups.outcome import goodput
from kvmesh.planner.groups.parts import assign, layout
from kvmesh.planner.groups.routing import Estimator
from kvmesh.planner.groups.timing import cut
from kvmesh.planner.observed_file import ObservedSection, applied
from kvmesh.planner.replan import Replanned, document, flipped, measured, replan, survivors
from kvmesh.planner.task import Task
from kvmesh.planner.task import build as build_task
from kvmesh.planner.world import SINK, SOURCE, Group, Phase, Route, Shard, Slo
from tests.unit.planner.tasks import LAYERS, SLO, small_tasks, task

P, D, M = Phase.PREFILL, Phase.DECODE, Phase.MIXED
LONG = 60.0


def whole(phase: Phase, host: int) -> Group:
    return Group(phase, (Shard(host, (0,), (0, LAYERS)),))


def weights(groups: tuple[Group, ...]) -> set[Shard]:
    return {shard for group in groups for shard in group.shards}


def test_drift_flips_a_group() -> None:
    wanted = task([("fast", 1)] * 4, slo=Slo(2.0, 0.03))
    groups = (whole(P, 0), whole(D, 1), whole(D, 2), whole(D, 3))
    longer = applied(wanted, ObservedSection(input_tokens=1400, output_tokens=8))
    found = replan(longer, groups, deadline=LONG)
    assert found.value > found.before * 1.5
    assert {flip.before for flip in found.flips} == {D}
    assert weights(found.groups) == weights(groups)
    assert found.value == goodput(Estimator(longer), found.groups, found.routing)


@settings(max_examples=10, deadline=None)
@given(small_tasks())
def test_flips_are_the_best_of_one_and_two(wanted: Task) -> None:
    groups = tuple(whole(D, host) for host in range(len(wanted.hosts)))
    estimator = Estimator(wanted)
    best = max(estimator.route(trial).value for trial in flipped(groups))
    assert replan(wanted, groups, deadline=LONG).value >= best * (1 - 1e-3)


def test_a_lost_host_of_a_chain_is_replaced_by_one_that_holds_the_same_layers() -> None:
    wanted = task([("fast", 1)] * 4)
    first, second = (Group(M, (Shard(i, (0,), (0, 4)), Shard(i + 1, (0,), (4, 8)))) for i in (0, 2))
    found = replan(wanted, (first, second), lost=[1], deadline=LONG)
    assert weights(found.groups) == {*first.shards[:1], *second.shards}
    assert all(cut(group, LAYERS) for group in found.groups)
    assert found.value >= found.before > 0
    assert not found.idle


def test_overlapping_layers_are_enough() -> None:
    wanted = task([("fast", 1)] * 4)
    first = Group(M, (Shard(0, (0,), (0, 5)), Shard(1, (0,), (5, 8))))
    second = Group(M, (Shard(2, (0,), (0, 3)), Shard(3, (0,), (3, 8))))
    found = replan(wanted, (first, second), lost=[2], deadline=LONG)
    assert weights(found.groups) == {*first.shards, second.shards[1]}
    assert node_flow(wanted, found.groups).value >= found.routing.total * (1 - 1e-6)


def test_a_shard_that_holds_the_lost_layers_lends_some_of_its_time() -> None:
    """Tokens must come faster than beside a prompt's chunk, so no group can do both as a whole."""
    wanted = task([("fast", 1)] * 6, slo=Slo(2.0, 0.03))
    estimator = Estimator(wanted)
    halves = [(Shard(i, (0,), (0, 4)), Shard(i + 1, (0,), (4, 8))) for i in (0, 2, 4)]
    groups = tuple(Group(phase, shards) for phase, shards in zip((P, D, D), halves, strict=True))
    left = survivors(estimator, groups, [1])
    shared = [shard for group in left for shard in group.shards if shard.time < 1]
    assert len(shared) == 2
    assert {group.phase for group in left} == {P, D}
    assert estimator.route(left).value > 0 == estimator.route(groups[1:]).value
    assert set(together(*left)) == {halves[0][0], *halves[1], *halves[2]}
    listed = document(wanted, Replanned(left, estimator.route(left), (), (), 0.0, 0.0, 0.0))["groups"]
    assert sum(share for group in listed for share in group["shares"].values()) == pytest.approx(1)
    found = replan(wanted, groups, lost=[1], deadline=LONG)
    assert found.value >= measured(estimator, left)[1][0] > 0 == found.before
    routes = [Route(i, j, rate / found.routing.total, 1.0) for (i, j), rate in found.routing.rates.items()]
    check(wanted, found.groups, routes, found.routing.total)


def test_loans_close_every_gap_and_give_away_no_time_twice() -> None:
    wanted = task([("fast", 1), ("slow", 1), ("fast", 1), ("fast", 1), ("fast", 1)])
    whole_groups = (
        Group(P, (Shard(0, (0,), (0, 5)), Shard(1, (0,), (5, 8)))),
        Group(D, (Shard(2, (0,), (0, 3)), Shard(3, (0,), (3, 8)))),
    )
    broken = Group(D, (Shard(4, (0,), (0, 4)),))
    trials = list(lent(Estimator(wanted), whole_groups, broken))
    assert missing(broken, LAYERS) == [4, 5, 6, 7]
    assert trials
    for trial in trials:
        assert not missing(trial[-1], LAYERS)
        for host in range(4):
            assert sum(s.time for g in trial for s in g.shards if s.host == host) == pytest.approx(1)
            assert all(0 < s.time <= 1 for g in trial for s in g.shards)
    assert not list(lent(Estimator(wanted), whole_groups[:0], broken))


def test_nothing_is_left() -> None:
    found = replan(task([("fast", 1)]), (whole(M, 0),), lost=[0])
    assert (found.groups, found.value) == ((), 0.0)


def test_parts_are_chosen_so_that_both_phases_balance() -> None:
    wanted = task([("fast", 1)] * 6)
    shards = tuple(Shard(host, (0,), (0, LAYERS)) for host in range(6))
    prefill, decode = assign(wanted, shards) or pytest.fail("no parts")
    estimator = Estimator(replace(wanted, objective="flow"))
    others = [
        estimator.route((Group(P, shards[:count]), Group(D, shards[count:]))).value for count in range(1, len(shards))
    ]
    assert estimator.route((prefill, decode)).value >= max(others) * 0.7
    assert assign(wanted, shards[:1]) is None


def test_stages_are_at_least_two_wide() -> None:
    wanted = task([("fast", 1)] * 4 + [("slow", 1)] * 3)
    small = replace(wanted, model=replace(wanted.model, bytes_per_layer=2e9))
    shards = layout(small, LONG)
    assert {shard.host for shard in shards} == set(range(7))
    for _, holders in cut(Group(M, shards), LAYERS):
        assert len(holders) >= 2


# Commands ------------------------------------------------------------------------------------------------------------

CLUSTER = """
name: lab
hosts:
  - {name: big, accelerator: A100-80G, accelerators: 4, dollars_per_hour: 8, replicas: 2}
links: {inside: {gigabytes_per_s: 12, milliseconds: 0.1}}
"""
WORKLOAD = """
name: chat
rate: 4
lengths: {input_tokens: 700, output_tokens: 100, input_cv: 0.8, output_cv: 0.8}
slo: {ttft_seconds: 1.0, tpot_seconds: 0.06}
"""


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    (tmp_path / "lab.yaml").write_text(CLUSTER)
    (tmp_path / "chat.yaml").write_text(WORKLOAD)
    return ["--cluster", str(tmp_path / "lab.yaml"), "--workload", str(tmp_path / "chat.yaml"), "--model", "opt-13b"]


@pytest.mark.parametrize("objective", ["goodput", "cost", "energy", "flow"])
def test_plan_then_replan(files: list[str], tmp_path: Path, objective: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan, decisions = tmp_path / "plan.json", tmp_path / "decisions.json"
    asked = [*files, "--algorithm", "thunderserve", "--objective", objective, "--time-limit", "2", "--json", str(plan)]
    assert execute(["plan", *asked, "--plot", str(tmp_path / "plan.svg")]) == 0
    assert "requests/s within the SLOs" in capsys.readouterr().out
    document = json.loads(plan.read_text())
    assert document["flow_tokens_per_s"] <= document["bound_tokens_per_s"]
    assert {node: document["phase"][node] for node in document["placement"]}
    assert document["inputs"]["slo_tpot_seconds"] == 0.06
    if objective == "cost":
        assert document["expected"]["dollars_per_hour"] == 8
    (tmp_path / "seen.yaml").write_text("{rate: 9, input_tokens: 1500, output_tokens: 20, speeds: {big-0: 0.8}}")
    observed = ["--observed", str(tmp_path / "seen.yaml")]
    assert execute(["replan", "--plan", str(plan), *observed, "--json", str(decisions)]) == 0
    found = json.loads(decisions.read_text())
    assert set(found) >= {"decisions", "groups", "routes", "value"}
    assert sum(route["weight"] for route in found["routes"]) == pytest.approx(1)


def test_a_plan_keeps_a_power_budget_and_tells_its_carbon(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.json"
    asked = ["plan", *files, "--algorithm", "splitwise", "--time-limit", "2", "--json", str(plan)]
    assert execute([*asked, "--power-budget", "2000", "--carbon", "400", "--carbon-budget", "400"]) == 0
    document = json.loads(plan.read_text())
    watts = document["expected"]["watts"]
    assert 0 < watts <= document["inputs"]["power_budget"] == 1000
    assert f"{watts:.0f} W of the hosts in use" in (out := capsys.readouterr().out)
    assert f"{0.4 * watts:.0f} g of CO2 an hour" in out
    assert execute(["replan", "--plan", str(plan)]) == 0
    assert execute([*asked, "--power-budget", "10"]) != 0
    assert "power_budget is 10 W, and the hosts of lab that hold opt-13b draw" in capsys.readouterr().err


def test_replan_names_what_is_wrong(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.json"
    assert execute(["plan", *files, "--algorithm", "splitwise", "--json", str(plan)]) == 0
    assert execute(["replan", "--plan", str(plan), "--lost", "big-7"]) == 1
    assert "big-7 is no host of lab" in capsys.readouterr().err
    document = json.loads(plan.read_text())
    document["groups"][0]["phase"] = "idle"
    del document["inputs"]["model"]
    plan.write_text(json.dumps(document))
    assert execute(["replan", "--plan", str(plan)]) == 1
    error = capsys.readouterr().err
    assert "groups.0.phase" in error
    assert "inputs.model" in error


def sentence(build: dict[str, object]) -> str:
    """What `task.build` says of a task that cannot be served."""
    good = task([("fast", 1), ("slow", 1)])
    fields = {
        "cluster": good.cluster,
        "model": good.model,
        "workload": good.workload,
        "slo": SLO,
        "speeds": good.speeds,
    }
    with pytest.raises(InvalidArgument) as error:
        build_task(**{**fields, **build})  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_is_said_in_a_sentence() -> None:
    good = task([("fast", 1), ("slow", 1)])
    large = replace(good.model, bytes_per_layer=5e9)
    assert "cluster test cannot hold small" in sentence({"model": large})
    assert "slo.tpot is 0.001 s, and a lone request's token takes" in sentence({"slo": Slo(2.0, 0.001)})
    assert "slo.ttft is 0.001 s, and only 0% of the prompts" in sentence({"slo": Slo(0.001, 1.0)})
    assert "slo.ttft is -1" in sentence({"slo": Slo(-1.0, 1.0)})
    assert "slo.attainment is 1" in sentence({"slo": Slo(1.0, 1.0, 1.0)})
    assert "no objective 'speed'" in sentence({"objective": "speed"})
    odd = replace(good.cluster, hosts=(replace(good.hosts[0], accelerator="abacus"), good.hosts[1]))
    assert "host h0 has a abacus" in sentence({"cluster": odd})
    deaf = replace(good.cluster, links={e: link for e, link in good.cluster.links.items() if e != (1, SINK)})
    assert "host h1 cannot send tokens" in sentence({"cluster": deaf})
    medium = replace(good.model, bytes_per_layer=1.5e9)
    ends = {e: link for e, link in good.cluster.links.items() if SOURCE in e or SINK in e}
    assert "has no link to the region of host h0" in sentence(
        {"model": medium, "cluster": replace(good.cluster, links=ends)}
    )


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("{name: x, rate: -1, lengths: {input_tokens: 1, output_tokens: 1}}", "rate"),
        ("{name: x}", "must have either lengths or a trace"),
        ("{name: x, trace: gone.csv}", "there is no file"),
        ("{name: x, lengths: {input_tokens: 5}}", "lengths.output_tokens"),
        ("{name: x, lengths: {input_tokens: 5, output_tokens: 5}, slo: {ttft_seconds: 1}}", "slo.tpot_seconds"),
    ],
)
def test_workload_files_are_checked(tmp_path: Path, text: str, field: str) -> None:
    path = tmp_path / "w.yaml"
    path.write_text(text)
    with pytest.raises(InvalidArgument, match=field):
        catalogue.workload(str(path))


def test_a_workload_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "chat.yaml"
    path.write_text(WORKLOAD)
    work = catalogue.workload(str(path))
    assert (work.name, work.rate, work.slo) == ("chat", 4, Slo(1.0, 0.06, 0.9))
    assert work.input_tokens == pytest.approx(700, rel=0.1)
    assert len(work.sample()) == 1000


@pytest.mark.parametrize("name", catalogue.accelerators())
def test_every_accelerator_can_be_planned_with(name: str) -> None:
    entry = catalogue.accelerators()[name]
    assert entry.source.startswith("https://")
    assert 0 < entry.resting_watts < entry.watts
    wanted = task([("fast", 1)])
    host = replace(wanted.hosts[0], accelerator=name, memory_bytes=entry.memory_gigabytes * 1e9)
    book = replace(wanted.speeds, accelerators={name: entry}, _known={})
    plain = replace(wanted, cluster=replace(wanted.cluster, hosts=(host,)), speeds=book)
    assert arrange("splitwise", plain, LONG)[0].flow.value > 0
