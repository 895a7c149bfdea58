"""`kvmesh operate` as a user meets it: the table, the JSON document, and one sentence for each failure."""

import json

import pytest

from kvmesh.cli.main import execute

MACHINE = "A100-80G/llama2-70b/8"
LOAD = ["operate", "--profile", MACHINE, "--count", "16", "--rate", "5", "--slo-ttft", "1", "--slo-tpot", "0.1"]


def test_totals(capsys):
    assert execute([*LOAD, "--carbon", "380", "--price", "20"]) == 0
    out = capsys.readouterr().out
    assert "on      3 of 16 instances" in out
    assert "J for each output token" in out
    assert "cost    60.00 dollars an hour" in out


def test_json_adds_up(tmp_path):
    path = tmp_path / "operation.json"
    assert execute([*LOAD, "--objective", "carbon", "--carbon", "380", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert document["watts"] == pytest.approx(sum(choice["watts"] for choice in document["on"]))
    assert document["grams_per_hour"] == pytest.approx(document["watts"] * 0.38)
    assert document["objective"] == pytest.approx(document["grams_per_hour"])
    assert document["bound"] <= document["objective"] * (1 + 1e-6)
    assert sum(choice["output_tokens_per_s"] for choice in document["on"]) == pytest.approx(5 * 240)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--power-budget", "2000"], "the power budget of 2000 W is too small: "),
        (["--profile", "T4"], "no power profile 'T4': there are A100-80G/"),
        (["--count", "1"], "the 1 instances of A100-80G/llama2-70b/8 cannot serve"),
        (["--objective", "joy"], "no objective 'joy': there are energy, cost, carbon"),
        (["--slo-tpot", "0.01"], "no operating point of any pool keeps the latency limits"),
    ],
)
def test_failures_are_one_sentence(arguments, message, capsys):
    assert execute([*LOAD, *arguments]) == 1
    assert message in capsys.readouterr().err
