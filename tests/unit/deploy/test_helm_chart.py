"""The chart, rendered by Helm's own library and checked against Kubernetes' schemas, both from wheels of `[lint]`."""

import json
from pathlib import Path

import pytest
import yaml

from kvmesh.planner import deployment_files
from kvmesh.planner.world import Host

helm = pytest.importorskip("helm_python", reason="helm-python-sdk is not installed")
kubernetes = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")

CHART = Path(__file__).parents[3] / "deploy/helm/kvmesh"
HOSTS = (Host("big", "A100x2", 80e9, 1e9, "A100-40G", 2, "campus"), Host("old_0", "T4", 16e9, 1e9, "T4", 1, "annex"))
DOCUMENT = {"placement": {"big": [0, 30], "old_0": [0, 30]}, "phase": {"big": "prefill", "old_0": "decode"}}
VERSIONS = ("1.27", "1.33")


def planned():
    deployed = deployment_files.deployment(DOCUMENT, HOSTS, "smollm2-135m-instruct", 30)
    return deployment_files.values(deployed) | {"plan": json.dumps(DOCUMENT)}


def rendered(values):
    """Objects by (kind, name)."""
    with helm.Chart.load(CHART) as chart:
        chart.validate_schema(values)
        texts = [text for path, text in chart.render(values, name="mesh").items() if path.endswith(".yaml")]
    objects = [entry for text in texts for entry in yaml.safe_load_all(text) if entry]
    return {(entry["kind"], entry["metadata"]["name"].removeprefix("mesh-kvmesh")): entry for entry in objects}


VALUES = {
    "default": {},
    "planned": planned(),
    "scaled": {
        "autoscaling": {"enabled": True},
        "router": {"powerBudget": 12000},
        "kvstore": {"replicas": 3, "replicationFactor": 2},
    },
    "elsewhere": {
        "redis": {"url": "rediss://user:secret@redis.example:6380/1"},
        "modelCache": {"existingClaim": "models"},
        "image": {"registry": "registry.example", "pullSecrets": [{"name": "pull"}]},
        "networkPolicy": {"clients": [{"podSelector": {"matchLabels": {"app": "web"}}}]},
    },
}


def test_lint():
    report = helm.lint(CHART)
    assert report["errors"] == []
    assert all(message["severity"] <= 1 for message in report["messages"])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", VALUES)
def test_manifests_are_what_kubernetes_takes(name, version):
    for entry in rendered(VALUES[name]).values():
        kubernetes.validate(entry, version, strict=True)


def pods(objects):
    return {
        key: entry["spec"]["template"]["spec"] for key, entry in objects.items() if "template" in entry.get("spec", {})
    }


def environment(container):
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}


@pytest.mark.parametrize("name", VALUES)
def test_pods_run_as_nobody_with_probes_and_limits(name):
    for pod in pods(rendered(VALUES[name])).values():
        assert pod["securityContext"]["runAsNonRoot"]
        for container in pod["containers"] + pod.get("initContainers", []):
            assert container["securityContext"]["readOnlyRootFilesystem"]
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"]
        assert all("readinessProbe" in container for container in pod["containers"])


def test_services_are_probed_by_grpc_health_and_have_time_to_drain():
    objects = rendered({})
    grace = int(objects["ConfigMap", ""]["data"]["KVMESH_DRAIN_GRACE"])
    for (_, name), pod in pods(objects).items():
        assert pod["terminationGracePeriodSeconds"] > grace
        if name != "-redis":
            assert pod["containers"][0]["livenessProbe"]["grpc"] == {"port": 50051}


def test_a_plan_becomes_workers_with_its_names():
    objects = rendered(planned())
    workers = {
        name: entry
        for (kind, name), entry in objects.items()
        if (kind == "Deployment" and "old" in name) or "big" in name
    }
    assert workers.keys() == {"-big", "-old-0"}
    assert ("Deployment", "-prefill") not in objects
    big = workers["-big"]["spec"]["template"]["spec"]
    assert big["containers"][0]["args"] == ["kvmesh_prefill"]
    assert big["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert big["nodeSelector"] == {"kvmesh.dev/host": "big"}
    assert environment(big["containers"][0])["KVMESH_WORKER_ID"] == "big"
    assert json.loads(objects["ConfigMap", "-plan"]["data"]["plan.json"]) == DOCUMENT
    router = objects["Deployment", "-router"]["spec"]["template"]["spec"]["containers"][0]
    assert environment(router)["KVMESH_PLAN"] == "/etc/kvmesh/plan.json"


def test_settings_reach_the_processes_as_they_can_read_them():
    objects = rendered(VALUES["scaled"])
    router = objects["Deployment", "-router"]["spec"]["template"]["spec"]["containers"][0]
    assert float(environment(router)["KVMESH_POWER_BUDGET"]) == 12000
    assert objects["ConfigMap", ""]["data"]["KVMESH_REPLICAS"] == "2"
    store = objects["StatefulSet", "-kvstore"]["spec"]["template"]["spec"]["containers"][0]
    assert int(environment(store)["KVMESH_DISK_BYTES"]) == 9 * 2**30


def test_what_scales_has_no_fixed_number_and_a_budget_of_disruptions():
    objects = rendered(VALUES["scaled"])
    assert "replicas" not in objects["Deployment", "-decode"]["spec"]
    assert ("HorizontalPodAutoscaler", "-decode") in objects
    assert {name for kind, name in objects if kind == "PodDisruptionBudget"} == {"-router", "-decode", "-kvstore"}


def test_only_the_router_is_open_to_everyone():
    objects = rendered({})
    assert objects["NetworkPolicy", "-mesh"]["spec"]["ingress"][0]["from"][0].keys() == {"podSelector"}
    clients = objects["NetworkPolicy", "-clients"]["spec"]
    assert clients["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "router"
    assert clients["ingress"] == [{"ports": [{"port": "grpc"}]}]


@pytest.mark.parametrize(
    "values",
    [
        {"workers": {"x": {"role": "nurse"}}},
        {"workers": {"x": {"role": "decode", "workerId": "a", "replicas": 2}}},
        {"workers": {"Upper": {"role": "decode"}}},
        {"router": {"powerBudget": -1}},
        {"settings": {"PATH": "x"}},
        {"kvstores": {}},
    ],
)
def test_bad_values_are_refused(values):
    with pytest.raises(helm.HelmValuesError), helm.Chart.load(CHART) as chart:
        chart.validate_schema(values)
