"""The plan file: followed when it changes, kept when it breaks."""

import json
import logging

import pytest

from kvmesh.errors import InvalidArgument
from kvmesh.scheduling.plan_weights import PlanWeights
from kvmesh.types import Role, WorkerInfo
from kvmesh_router.plan_file import PlanFile

MESH = [WorkerInfo("a", 1, Role.MIXED, "", 1), WorkerInfo("b", 1, Role.PREFILL, "", 1)]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "plan.json"
    write(path, a="prefill")
    return PlanFile(path, PlanWeights(), lambda: MESH)


def write(path, **phase):
    path.write_text(
        json.dumps({"phase": phase, "links": [], "note": "x" * len(path.read_text() if path.exists() else "")})
    )


def phase_of(file, number=0):
    return file.policy.fleet.phases.of(MESH[number])


async def test_what_it_says_holds_and_a_change_is_noticed(file):
    await file.read()
    assert phase_of(file) is Role.PREFILL
    write(file.path, a="decode")
    await file.refresh()
    assert phase_of(file) is Role.DECODE


async def test_a_broken_file_is_said_once_and_changes_nothing(file, caplog):
    await file.read()
    file.path.write_text("{")
    with caplog.at_level(logging.ERROR):
        await file.refresh()
        await file.refresh()
    assert caplog.text.count("keeping the plan as it was") == 1
    file.path.unlink()
    await file.refresh()
    assert "cannot be read" in caplog.text
    assert phase_of(file) is Role.PREFILL
    write(file.path, a="decode")
    await file.refresh()
    assert phase_of(file) is Role.DECODE


async def test_workers_that_cannot_change_are_named(file, caplog):
    write(file.path, a="decode", b="decode")
    with caplog.at_level(logging.WARNING):
        await file.read()
    assert "these stay as they are: b" in caplog.text
    assert phase_of(file, 1) is Role.PREFILL


async def test_at_the_start_it_must_be_good(tmp_path):
    with pytest.raises(InvalidArgument, match="cannot be read"):
        async with PlanFile(tmp_path / "none.json", PlanWeights(), list).followed():
            pass
