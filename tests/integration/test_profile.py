"""`kvmesh profile` against live fake workers: every point of the grid, a file that reads back, clear refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmesh.bench.profiling import Grid, Profiler, geometric
from kvmesh.errors import InvalidArgument
from kvmesh.planner.latency import measured
from kvmesh.rpc.channel import ChannelPool
from tests.integration.mesh import Mesh

SLOW = {"fake_step_seconds": 0.003}
GRID = Grid([16, 32, 64, 128, 256, 600], [1, 2, 4], [32, 200], repeats=1, steps=8)


async def test_a_decode_worker_is_measured_at_every_point(tmp_path: Path) -> None:
    told: list[str] = []
    async with Mesh(prefill=0, kvstore=0, decode_settings=SLOW) as mesh, ChannelPool() as channels:
        profiler = Profiler(channels, mesh["decode-0"].address, told.append)
        info = await profiler.connect()
        found = await profiler.run(GRID, 512)
    assert [point.tokens for point in found.prefill] == GRID.lengths
    assert [point.batch for point in found.decode] == [1, 1, 2, 2, 4, 4]
    # While the streams run together their contexts are those of the prompts, and some of the tokens.
    for point, context in zip(found.decode, [32, 200] * 3, strict=True):
        assert point.batch * context < point.context < point.batch * (context + GRID.steps + 33)
    assert len(told) == 12
    assert found.kv_tokens == info.capacity.blocks * info.capacity.block_tokens
    path = tmp_path / "measured.json"
    found.write(path)
    assert measured.read(path) == found
    assert measured.read(path).latency().prefill([100]) > 0


async def test_a_prefill_worker_has_prompts_only() -> None:
    async with Mesh(decode=0, kvstore=0) as mesh, ChannelPool() as channels:
        profiler = Profiler(channels, mesh["prefill-0"].address)
        await profiler.connect()
        found = await profiler.run(GRID, 512)
    assert (len(found.prefill), found.decode) == (6, ())
    assert found.latency().decode(1, 100) > 0


async def test_a_store_cannot_be_profiled() -> None:
    async with Mesh(prefill=0, decode=0) as mesh, ChannelPool() as channels:
        with pytest.raises(InvalidArgument, match="is a kvstore: name a prefill or decode worker"):
            await Profiler(channels, mesh["kvstore-0"].address).connect()


def test_points_that_do_not_fit_the_worker_are_left_out() -> None:
    assert GRID.decode_points(kv_tokens=300, max_running=2) == [(1, 32), (1, 200), (2, 32)]


def test_a_geometric_grid_has_both_ends() -> None:
    grid = geometric(16, 2048, 8)
    assert (grid[0], grid[-1], len(grid)) == (16, 2048, 8)
