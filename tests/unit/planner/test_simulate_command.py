"""`kvmesh simulate` as a user meets it: tables, the JSON document, a picture, and one sentence for each failure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvmesh.cli.main import execute
from kvmesh.cli.simulate import parse_slo
from kvmesh.errors import InvalidArgument
from kvmesh.planner import traces
from kvmesh.planner.simulator import HandOver, Phase
from kvmesh.planner.simulator.deployment_file import deployment, deployment_names, read_deployment
from kvmesh.scheduling.policy import Slo

SHORT = ["simulate", "--deployment", "eight-a100", "--requests", "60", "--points", "3"]
GOOD = """
name: two
model: opt-13b
hand_over: direct
codec_ratio: 4
instances:
  - {name: p, phase: prefill, accelerator: A100-80G, region: here}
  - {name: d, phase: decode, accelerator: A100-80G, tensor_parallel: 2, region: there, kv_tokens: 4096}
links:
  gigabytes_per_s: 10
  milliseconds: 1
  port_gigabytes_per_s: 5
  pairs: [{between: [here, there], gigabytes_per_s: 0.1, milliseconds: 20}]
"""


def test_simulate_prints_latencies_instances_and_the_curve(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute([*SHORT, "--rate", "8", "--slo", "ttft=1,tpot=0.05"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[1:4]] == ["TTFT", "TPOT", "E2E"]
    assert sum("prefill-" in line for line in out.splitlines()) == 3
    assert sum("decode-" in line for line in out.splitlines()) == 5
    assert "attainment 100.0% of 60 requests" in out
    assert sum("█" in line for line in out.splitlines()) == 3


def test_json_holds_every_request_and_the_same_figures(tmp_path: Path) -> None:
    path, again = tmp_path / "run.json", tmp_path / "again.json"
    arguments = [*SHORT, "--rate", "8", "--slo", "ttft=1"]
    assert execute([*arguments, "--json", str(path)]) == 0
    assert execute([*arguments, "--json", str(again)]) == 0
    first, second = (json.loads(one.read_text()) for one in (path, again))
    assert len(first["requests"]) == 60
    assert first["requests"] == second["requests"]
    assert first["slo"] == {"ttft": 1.0}
    assert [point["rate"] for point in first["curve"]] == [4.0, 10.0, 16.0]


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_picture_is_drawn(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"run{suffix}"
    assert execute([*SHORT, "--rate", "8", "--slo", "tpot=0.05", "--plot", str(path)]) == 0
    assert path.stat().st_size > 1000


@pytest.mark.parametrize("policy", ["placement", "splitwise", "hybrid", "prefix-aware"])
def test_every_policy_of_the_router_can_be_simulated(policy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute([*SHORT, "--points", "0", "--rate", "8", "--policy", policy]) == 0
    assert f"({policy})" in capsys.readouterr().out


def test_all_shipped_deployments_can_be_read() -> None:
    for name in deployment_names():
        assert deployment(name).instances


def test_a_plan_can_be_simulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    plan = ["plan", "--cluster", "two-sites", "--model", "llama-30b", "--algorithm", "petals", "--json", str(path)]
    assert execute(plan) == 0
    capsys.readouterr()
    assert execute(["simulate", "--plan", str(path), "--rate", "0.1", "--requests", "20", "--points", "0"]) == 0
    assert "attainment 100.0% of 20 requests" in capsys.readouterr().out


def test_a_mooncake_trace_is_replayed_with_its_prefixes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 1000 * i, "input_length": 1100, "output_length": 4, "hash_ids": [1, 2, 3]} for i in range(4)]
    trace.write_text("\n".join(map(json.dumps, rows)))
    assert execute(["simulate", "--deployment", "eight-a100", "--workload", str(trace), "--policy", "placement",
                    "--points", "0"]) == 0  # fmt: skip
    # Of four equal prompts the later three are in the pool of the first, but for the tokens after the last full block.
    assert "74% of prompts cached" in capsys.readouterr().out


def test_a_trace_can_be_paced(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = [f"2023-11-16 18:00:{second:02}.0000000,100,5" for second in range(0, 50, 10)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    assert [one.at for one in traces.replay(trace)] == [0, 10, 20, 30, 40]
    assert [one.at for one in traces.replay(trace, rate=0.25)] == [0, 5, 10, 15, 20]


def test_a_deployment_file_says_everything(tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    path.write_text(GOOD)
    found = read_deployment(path)
    prefill, decode = found.instances
    assert (prefill.phase, decode.phase) == (Phase.PREFILL, Phase.DECODE)
    assert decode.kv_tokens == 4096
    # 90 % of 80 GB less 25.7 GB of weights, at 819 200 bytes a token.
    assert prefill.kv_tokens == pytest.approx(56_500, rel=0.01)
    assert decode.latency.prefill([2048]) < prefill.latency.prefill([2048])
    assert found.wire_bytes(100) == 100 * 819_200 / 4
    assert (found.hand_over, found.layers) == (HandOver.DIRECT, 40)
    assert found.links.pairs["there", "here"].bytes_per_s == 1e8
    assert found.links.port_bytes_per_s == 5e9


def test_every_fault_of_a_deployment_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    text = GOOD.replace("[here, there]", "[here, moon]").replace(
        "accelerator: A100-80G, region: here", "accelerator: B100"
    )
    path.write_text(text.replace("{name: d,", "{name: p,"))
    with pytest.raises(InvalidArgument) as caught:
        read_deployment(path)
    message = str(caught.value)
    assert "instance p appears more than once" in message
    assert "instance p has accelerator 'B100'; known: " in message
    assert "links.pairs.0 names 'moon', which is neither an instance nor a region" in message


BAD = {
    "phase": (GOOD.replace("phase: prefill", "phase: cooking"), "instances.0.phase"),
    "no model": (GOOD.replace("model: opt-13b\n", ""), "has an accelerator, so the deployment needs a model"),
    "unknown model": (GOOD.replace("opt-13b", "gpt-9"), "model 'gpt-9' is unknown; known: "),
    "nobody decodes": (GOOD.replace("phase: decode", "phase: prefill"), "only prefill: nobody would decode"),
    "no machine": (
        GOOD.replace("accelerator: A100-80G, region: here", "region: here"),
        "either an accelerator or a profile",
    ),
    "no file": (
        GOOD.replace("accelerator: A100-80G, region: here", "profile: x.json"),
        "no such file beside the deployment",
    ),
    "too small": (
        GOOD.replace("accelerator: A100-80G, region: here", "accelerator: T4, region: here"),
        "25.7 GB of weights",
    ),
    "not yaml": ("{", "is not YAML"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_deployment_is_one_sentence(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, sentence = BAD[name]
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert execute(["simulate", "--deployment", str(path), "--rate", "1"]) == 1
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


REFUSED = {
    "neither deployment nor plan": (["simulate", "--rate", "1"], "name either a --deployment or a --plan"),
    "unknown deployment": (["simulate", "--deployment", "x"], "no deployment 'x': known are eight-a100"),
    "no rate": (
        ["simulate", "--deployment", "eight-a100"],
        "azure-conv does not say how many requests come: give --rate",
    ),
    "unknown policy": ([*SHORT, "--rate", "1", "--policy", "luck"], "there is no policy 'luck'"),
    "unknown workload": ([*SHORT, "--rate", "1", "--workload", "x"], "no workload 'x'"),
    "picture": ([*SHORT, "--rate", "1", "--plot", "x.bmp"], "cannot draw x.bmp"),
    "no plan": (["simulate", "--plan", "x.json", "--rate", "1"], "there is no plan x.json"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_options_are_one_sentence(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, sentence = REFUSED[name]
    assert execute(arguments) == 1
    assert sentence in capsys.readouterr().err


def test_objectives_are_parsed() -> None:
    assert parse_slo("ttft=1,tpot=0.05") == Slo(1.0, 0.05)
    assert parse_slo("tpot=0.1") == Slo(tpot=0.1)
    assert parse_slo("") == Slo()


@pytest.mark.parametrize("text", ["ttft", "ttft=x", "itl=1", "tpot=-1", "tpot=nan"])
def test_objectives_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="--slo: "):
        parse_slo(text)
