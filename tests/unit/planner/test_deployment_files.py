"""What `kvmesh plan --deploy` writes: one worker for each host of the plan, valid where it can be checked here."""

import json

import pytest
import yaml

from kvmesh.errors import InvalidArgument
from kvmesh.planner import deployment_files
from kvmesh.planner.world import Host

HOSTS = (
    Host("big", "A100x2", 80e9, 1e9, "A100-40G", 2, "campus"),
    Host("old_0", "T4", 16e9, 1e9, "T4", 1, "annex"),
    Host("Old.1", "T4", 16e9, 1e9),
)
DOCUMENT = {
    "algorithm": "kvmesh",
    "placement": {"big": [0, 30], "old_0": [0, 30], "Old.1": [0, 12]},
    "phase": {"big": "prefill", "old_0": "decode", "Old.1": "mixed"},
}


@pytest.fixture
def deployed():
    return deployment_files.deployment(DOCUMENT, HOSTS, "smollm2-135m-instruct", 30, {"KVMESH_CODEC": "int8"})


def test_files(deployed, tmp_path):
    folder = tmp_path / "new" / "deploy"
    paths = deployment_files.write(folder, deployed)
    assert [path.name for path in paths] == ["plan.json", "compose.plan.yaml", "values.plan.yaml"]
    assert json.loads(paths[0].read_text()) == DOCUMENT
    services = yaml.safe_load(paths[1].read_text())["services"]
    assert services["router"]["volumes"] == [f"{folder.resolve()}/plan.json:/etc/kvmesh/plan.json:ro"]
    assert services["prefill"]["deploy"]["replicas"] == services["decode"]["deploy"]["replicas"] == 0
    assert deployment_files.write(folder, deployed) == paths  # Again, over what is there.


def test_compose_workers(deployed, tmp_path):
    services = deployment_files.compose(deployed, tmp_path)["services"]
    big = services["worker-big"]
    assert big["command"] == ["kvmesh_prefill"]
    assert big["environment"]["KVMESH_WORKER_ID"] == "big"
    assert big["environment"]["KVMESH_CODEC"] == "int8"
    assert big["deploy"]["resources"]["reservations"]["devices"][0]["count"] == 2
    assert services["worker-old-1"]["command"] == ["kvmesh_mixed"]
    assert "deploy" not in services["worker-old-1"]


def test_chart_values(deployed):
    workers = deployment_files.values(deployed)["workers"]
    assert workers["prefill"] is workers["decode"] is None
    assert workers["old-0"] == {
        "role": "decode",
        "replicas": 1,
        "workerId": "old_0",
        "accelerators": 1,
        "nodeSelector": {"kvmesh.dev/host": "old_0"},
        "labels": {"kvmesh.dev/layers": "0-29", "kvmesh.dev/region": "annex"},
    }


def test_hosts_with_some_layers_are_named(deployed):
    assert deployed.partial == ["Old.1"]


def test_groups_that_share_a_host_are_workers_of_their_own():
    document = {
        "placement": {"big:0": [0, 30], "big:1": [0, 30]},
        "phase": {"big:0": "prefill", "big:1": "decode"},
        "groups": [
            {"phase": phase, "shards": [{"host": "big", "accelerators": [number], "layers": [0, 30]}]}
            for number, phase in enumerate(("prefill", "decode"))
        ],
    }
    workers = deployment_files.deployment(document, HOSTS, "fake", 30).workers
    assert [(worker.key, worker.host, worker.accelerators) for worker in workers] == [
        ("big-0", "big", 1),
        ("big-1", "big", 1),
    ]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"placement": {"a.b": [0, 1], "a-b": [0, 1]}, "phase": {"a.b": "mixed", "a-b": "mixed"}}, "hosts a.b and a-b"),
        ({"placement": {"a": [0, 1]}, "phase": {"a": "dream"}}, "host a has phase 'dream': there are prefill"),
    ],
)
def test_what_cannot_be_deployed(document, message):
    with pytest.raises(InvalidArgument, match=message):
        deployment_files.deployment(document, HOSTS, "fake", 1)
