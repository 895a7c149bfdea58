"""`kvmesh plan` as a user meets it: the table, the JSON document, pictures, and one sentence for each failure."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from kvmesh.cli.main import execute
from kvmesh.planner import catalogue
from kvmesh.planner.algorithms import ALGORITHMS, place
from kvmesh.planner.drawing import draw
from kvmesh.planner.report import kv_requests, rows
from kvmesh.planner.world import Workload
from tests.unit.planner.problems import make

SINGLE = ["plan", "--cluster", "single24", "--model", "llama2-70b"]


def test_plan_prints_hosts_flow_and_bound(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute([*SINGLE, "--workload", "azure-conv", "--algorithm", "helix", "--objective", "flow"]) == 0
    out = capsys.readouterr().out
    assert "2045.6 tokens/s, prompt and decode together (decode 495.9)" in out
    assert "gap 0.0%" in out
    assert sum("A100" in line for line in out.splitlines()) == 4


def test_json_is_what_the_plan_says(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    assert execute([*SINGLE, "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert list(document) == [
        "algorithm", "flow_tokens_per_s", "bound_tokens_per_s", "seconds", "placement", "phase", "links",
        "gap", "groups", "standby", "routes", "expected", "inputs",
    ]  # fmt: skip
    assert document["algorithm"] == "helix"
    assert document["flow_tokens_per_s"] == pytest.approx(2045.64, abs=0.01)
    assert document["flow_tokens_per_s"] <= document["bound_tokens_per_s"]
    spans = sorted(document["placement"].values())
    assert spans[0][0] == 0
    assert spans[-1][1] == 80
    assert all(a[1] == b[0] for a, b in pairwise(spans))
    assert set(document["phase"]) == set(document["placement"]) <= {str(i) for i in range(24)}
    from_source = [link for link in document["links"] if link["from"] == "source"]
    assert sum(link["flow_tokens_per_s"] for link in from_source) == pytest.approx(document["flow_tokens_per_s"])


def test_a_cluster_file_of_helix_works(tmp_path: Path) -> None:
    path = tmp_path / "cluster24.ini"
    path.write_text(catalogue.cluster_names()["single24"].read_text())
    assert execute(["plan", "--cluster", str(path), "--model", "llama2-70b", "--algorithm", "swarm"]) == 0


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_plots(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"flow{suffix}"
    assert execute([*SINGLE, "--plot", str(path)]) == 0
    head = path.read_bytes()[:200]
    assert b"<?xml" in head if suffix == ".svg" else head.startswith(b"\x89PNG")


def test_an_idle_host_is_drawn_as_absent(tmp_path: Path) -> None:
    task = make(1, [(9.0,), ()])
    plan = place("helix", task)
    draw(task, plan, tmp_path / "x.svg", "title")
    assert [row.host for row in rows(task, plan)] == ["h0"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--algorithm", "magic"], "no algorithm 'magic': there are helix, helix-milp, swarm, petals, separate,"),
        (["--objective", "speed"], "no objective 'speed': there are flow, goodput, cost, energy"),
        (["--power-budget", "900"], "helix knows no watts; for budgets of power or carbon take --algorithm kvmesh"),
        (["--carbon-budget", "900"], "--carbon-budget needs --carbon, the grams of CO2 for a kWh"),
        (["--objective", "goodput"], "helix knows no objective but flow; for goodput take --algorithm kvmesh"),
        (["--algorithm", "kvmesh"], "the objective goodput needs --slo-ttft and --slo-tpot, or a workload file with"),
        (["--workload", "nonsense"], "no workload 'nonsense': known are azure-conv, azure-code"),
        (["--plot", "flow.gif"], "cannot draw flow.gif: the name must end in .png, .svg, .pdf"),
        (["--algorithm", "separate"], "separate: no machine type can hold all 80 layers alone (L4 56, T4 48, A100 48)"),
    ],
)
def test_failures_are_one_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute([*SINGLE, *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith(f"kvmesh: {sentence}")


def test_help_names_every_algorithm(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["plan", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ALGORITHMS)


def test_other_commands_do_not_load_the_solver() -> None:
    code = "import sys, kvmesh.cli.main; assert not {'highspy', 'matplotlib', 'yaml'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_kv_room_is_that_of_the_poorest_layer() -> None:
    task = make(3, [(9.0, 5.0), (9.0,)])
    # 1000 positions x layers: 500 positions of two layers, 1000 of one
    assert kv_requests(task, {0: (0, 2), 1: (2, 3)}, Workload("w", 40, 10)) == 10
