"""Router and kvstore in an environment with nothing but their own extras, as in the `light` image: no torch."""

import asyncio
import importlib.util
import os
import subprocess
import venv
from pathlib import Path

import pytest

from kvmesh import redis_server
from kvmesh.cli.launch import free_port
from kvmesh.rpc.probe import serving

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    folder = tmp_path_factory.mktemp("light")
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    command = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-compile",
        "-c",
        ROOT / "constraints.txt",
        f"{ROOT}[router,kvstore]",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    return python


def run(python, code):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [python, "-c", code], cwd="/", env=environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("module", ["torch", "transformers", "pytest"])
def test_it_is_light(python, module):
    assert importlib.util.find_spec(module) is not None, "the test would prove nothing"
    assert "ModuleNotFoundError" in run(python, f"import {module}").stderr


@pytest.mark.parametrize("role", ["router", "kvstore"])
async def test_light_services_serve(python, role, tmp_path):
    port = free_port()
    environment = {**os.environ, "KVMESH_PORT": str(port), "KVMESH_MODEL": "fake", "KVMESH_DISK_PATH": str(tmp_path)}
    environment.pop("PYTHONPATH", None)
    with redis_server.start() as redis:
        environment["KVMESH_REDIS_URL"] = redis.url
        process = await asyncio.create_subprocess_exec(
            python, "-m", f"kvmesh_{role}", cwd=tmp_path, env=environment
        )  # fmt: skip
        try:
            async with asyncio.timeout(60):
                while not await serving(f"127.0.0.1:{port}"):
                    assert process.returncode is None
                    await asyncio.sleep(0.1)
                process.terminate()
                assert await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


def test_the_console_script_talks(python):
    result = subprocess.run(
        [python.parent / "kvmesh", "status", "--address", "127.0.0.1:1"], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr.startswith("kvmesh: no router answers")) == (1, True)


def test_up_says_what_is_missing(python, tmp_path):
    """`up` needs the server binaries and the engine of kvmesh[all]; without, it is one sentence, not a traceback."""
    result = subprocess.run(
        [python.parent / "kvmesh", "up", "--model", "fake", "--port", str(free_port())],
        env={"PATH": str(tmp_path), "XDG_STATE_HOME": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert "Redis-protocol server" in result.stderr
    assert "Traceback" not in result.stderr
