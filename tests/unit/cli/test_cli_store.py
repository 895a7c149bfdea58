"""`kvmesh kv stat|ls|verify|evict` without a mesh, how their tables read, and what `kvmesh up` tells its stores."""

import json

import pytest

from kvmesh import redis_server
from kvmesh.cli.main import execute
from kvmesh.cli.plan import MeshPlan
from kvmesh.cli.render import status_table
from kvmesh.cli.store_tables import chunks_json, qualities, savings, savings_of, size, stat_json, tenants_table
from kvmesh.client import WorkerStatus
from kvmesh.types import Role, TierCounts, WorkerInfo, WorkerStatistics
from kvmesh.v1 import kvstore_pb2 as pb


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["evict", "--yes"], 1, "name keys"),
        (["evict", "--all", "--tenant", "-", "--yes"], 1, "name keys"),
        (["evict", "abc", "--yes"], 1, "64 hexadecimal digits"),
        (["evict", "--tenant", "xyz", "--yes"], 1, "32 hexadecimal digits"),
        (["ls", "--limit", "-1"], 2, "--limit"),
        (["stat", "--redis", "http://nowhere"], 1, "not the URL"),
        (["stat", "--redis", "redis://127.0.0.1:1/0"], 1, "registry cannot be reached"),
        (["verify", "--redis", "redis://127.0.0.1:1/0"], 1, "registry cannot be reached"),
    ],
)
def test_bad_usage_is_one_sentence(arguments, code, says, capsys):
    assert execute(["kv", *arguments]) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert says in said.err


def test_a_mesh_without_stores(capsys):
    with redis_server.start() as redis:
        assert execute(["kv", "stat", "--redis", redis.url]) == 1
    assert "no kvstore is registered" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["stat", "ls", "verify", "evict", "calibrate"])
def test_help(command, capsys):
    assert execute(["kv", command, "--help"]) == 0
    assert f"Usage: kvmesh kv {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1536, "1.5 KiB"), (3 << 20, "3 MiB"), (5 << 40, "5 TiB")]
)
def test_sizes(count, text):
    assert size(count) == text


def test_savings_are_those_of_all_tiers_that_are_here():
    tiers = [
        pb.TierReading(tier=pb.CHUNK_TIER_MEMORY, used_bytes=1 << 20),
        pb.TierReading(tier=pb.CHUNK_TIER_DISK, used_bytes=1 << 20),
        pb.TierReading(tier=pb.CHUNK_TIER_REMOTE, used_bytes=1 << 30),
    ]
    reading = pb.GetTiersResponse(
        tiers=tiers,
        raw_bytes=8 << 20,
        chunks_by_quality={"transform:3": 5, "raw": 1},
        tenants=[pb.TenantReading(tenant=b"", chunks=6, used_bytes=2 << 20)],
        hits=3,
    )
    assert savings({"a": reading, "b": reading}) == (
        "saved 12 MiB (4.0×) · transform:3 ×10, raw ×2 · 6 hits, 0 misses, 0 damaged"
    )
    assert [list(column.cells) for column in tenants_table({"a": reading, "b": reading}).columns] == [
        ["-"], ["12"], ["4 MiB"],
    ]  # fmt: skip
    assert json.loads(stat_json({"a": reading}))["a"]["tiers"][2] == {
        "tier": "remote", "budget_bytes": 0, "used_bytes": 1 << 30, "chunks": 0, "hits": 0, "admissions": 0,
        "evictions": 0, "errors": 0, "misses": 0, "read_bytes": 0,
    }  # fmt: skip


def test_nothing_stored_saves_nothing():
    assert (savings_of(0, 0), savings_of(5, 9), qualities({})) == ("-", "none", "-")


def test_chunks_as_json_have_keys_in_hexadecimal_digits():
    chunk = pb.StoredChunk(key=b"k" * 32, tenant=b"t" * 16, tier=pb.CHUNK_TIER_DISK, size=5)
    [fields] = json.loads(chunks_json({"a": [chunk]}))
    assert (fields["key"], fields["tenant"], fields["tier"], fields["size"]) == ("6b" * 32, "74" * 16, "disk", 5)


def test_the_status_shows_what_codecs_save_and_store():
    info = WorkerInfo("store", 1, Role.KVSTORE, "127.0.0.1:1", 1)
    statistics = WorkerStatistics(memory_bytes=1 << 20, raw_bytes=3 << 20, chunks_by_quality={"transform:2": 7})
    statistics.tiers = {"memory": TierCounts(5, 2, 1 << 20), "remote": TierCounts(1, 1, 512)}
    statistics.missed_chunks_total, statistics.missed_replicas_total = 4, 3
    cells = [cell for column in status_table([WorkerStatus(info, statistics)], False).columns for cell in column.cells]
    assert "2 MiB (3.0×)" in cells
    assert "transform:2 ×7" in cells
    assert "memory 5/2 1 MiB, remote 1/1 512 B" in cells
    assert "4/3" in cells


def test_each_store_of_a_mesh_has_a_folder_of_its_own():
    plan = MeshPlan("fake", kvstore=2, settings={"KVMESH_DISK_PATH": "/somewhere"})
    folders = {s.environment["KVMESH_DISK_PATH"] for s in plan.services("redis://") if s.role is Role.KVSTORE}
    assert folders == {"/somewhere/kvstore-0", "/somewhere/kvstore-1"}
