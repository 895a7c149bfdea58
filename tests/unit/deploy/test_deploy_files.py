"""The deploy files, as far as they can be judged without a container engine: linters, schema, what scaling needs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kvmesh.planner import deployment_files
from kvmesh.planner.world import Host
from kvmesh.telemetry.metrics import Metrics

ROOT = Path(__file__).parents[3]
COMPOSE = ROOT / "deploy/compose/compose.yaml"
OBSERVABILITY = ROOT / "deploy/observability/compose.observability.yaml"
CHART = ROOT / "deploy/helm/kvmesh"
DOCKERFILE = ROOT / "deploy/docker/Dockerfile"
SCALED = ("prefill", "decode", "mixed", "kvstore")


@pytest.fixture(scope="module")
def services():
    return yaml.safe_load(COMPOSE.read_text())["services"]


def check(tool, *arguments):
    """Runs a linter that lies beside this Python, as `pip install kvmesh[lint]` puts it."""
    path = shutil.which(tool, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if path is None:
        pytest.skip(f"{tool} is not installed")
    result = subprocess.run(
        [path, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_dockerfile_lint():
    check("hadolint", DOCKERFILE)


def test_compose_schema():
    check("check-jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE, OBSERVABILITY)


def test_a_planned_layer_fits_the_compose_schema(tmp_path):
    document = {"placement": {"big": [0, 30], "old": [0, 30]}, "phase": {"big": "prefill", "old": "decode"}}
    hosts = (Host("big", "A100x2", 80e9, 1e9, "A100-40G", 2), Host("old", "T4", 16e9, 1e9))
    deployed = deployment_files.deployment(document, hosts, "smollm2-135m-instruct", 30)
    paths = deployment_files.write(tmp_path, deployed)
    check("check-jsonschema", "--builtin-schema", "vendor.compose-spec", paths[1])
    check(
        "check-jsonschema",
        "--schemafile",
        CHART / "values.schema.json",
        "--default-filetype",
        "yaml",
        CHART / "values.yaml",
    )


def test_the_dashboard_asks_for_metrics_that_exist():
    """Every instrument, under the name that Prometheus has for it."""
    recorded = Names()
    Metrics(recorded)
    text = (ROOT / "deploy/observability/grafana/kvmesh.json").read_text()
    asked = set(re.findall(r"kvmesh_(\w+?)(?:_bucket)?(?=[\[) {\"])", text))
    assert asked
    assert asked <= recorded.names


class Names:
    """Makes no instruments, and remembers what they are called."""

    def __init__(self):
        self.names = set()

    def counter(self, name, description):
        self.names.add(f"{name}_total")

    def gauge(self, name, description):
        self.names.add(name)

    def histogram(self, name, description, buckets):
        self.names.add(name)


def test_yaml_style():
    check("yamllint", "--strict", "deploy")


def test_images_run_as_nobody_with_a_probe():
    text = DOCKERFILE.read_text()
    stages = dict(re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM|\Z)", text, re.MULTILINE | re.DOTALL))
    for target in ("light", "engine"):
        assert "USER 10001" in stages[target]
        assert "--from=build-" + target in stages[target]
    assert "kvmesh.rpc.probe" in stages["base"]


def test_the_light_image_has_no_engine():
    assert "'.[router,kvstore]'" in DOCKERFILE.read_text()


@pytest.mark.parametrize("name", SCALED)
def test_scaled_services_own_nothing_on_the_host(services, name):
    service = services[name]
    assert not {"container_name", "ports", "hostname"} & service.keys()
    named = [volume for volume in service.get("volumes", []) if isinstance(volume, str) and not volume.endswith(":ro")]
    assert named == []


def test_each_role_has_its_command(services):
    for role in ("router", *SCALED):
        assert services[role]["command"] == [f"kvmesh_{role}"]
        assert services[role]["environment"]["KVMESH_REDIS_URL"] == "redis://redis:6379/0"


def test_a_service_has_time_to_drain(services):
    for role in ("router", *SCALED):
        grace = float(services[role]["environment"]["KVMESH_DRAIN_GRACE"])
        assert float(services[role]["stop_grace_period"].rstrip("s")) > grace


def test_every_variable_is_in_the_env_file():
    defined = {line.split("=")[0] for line in (COMPOSE.parent / ".env").read_text().splitlines() if "=" in line}
    assert set(re.findall(r"\$\{(\w+)\}", COMPOSE.read_text())) == defined


def test_the_entrypoint_is_executable():
    assert os.access(ROOT / "deploy/docker/entrypoint", os.X_OK)


def test_the_entrypoint_advertises_the_host_name(tmp_path):
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$KVMESH_ADVERTISE $*"\n')
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("KVMESH_ADVERTISE", None)
    entrypoint = ROOT / "deploy/docker/entrypoint"
    for extra, host in (({}, os.uname().nodename), ({"KVMESH_ADVERTISE": "elsewhere"}, "elsewhere")):
        result = subprocess.run(
            [entrypoint, "kvmesh_decode"], env={**environment, **extra}, capture_output=True, text=True, check=True
        )
        assert result.stdout == f"{host} -m kvmesh_decode\n"


def test_make_help_lists_the_verbs():
    result = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = {line.split()[0] for line in result.stdout.splitlines()}
    assert {"install", "run", "test", "lint", "format", "protos", "bench", "up", "down", "clean", "help"} <= listed
