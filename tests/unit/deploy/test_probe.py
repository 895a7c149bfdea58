"""The container probe says what the health service says."""

import subprocess
import sys

from kvmesh.rpc.probe import main, serving
from kvmesh.rpc.server import serve


async def test_a_serving_process():
    async with serve(host="127.0.0.1", port=0, services=[]) as server:
        assert await serving(server.address)
        assert not await serving(server.address, "kvmesh.v1.NoSuchService")
        await server.drain(0)
    assert not await serving(server.address, timeout=1.0)


def test_nobody_there():
    result = subprocess.run(
        [sys.executable, "-m", "kvmesh.rpc.probe", "127.0.0.1:1"], capture_output=True, timeout=30, check=False
    )
    assert result.returncode == 1


def test_usage(capsys):
    assert main([]) == 2
    assert "usage" in capsys.readouterr().err
