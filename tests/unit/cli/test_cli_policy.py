"""What `kvmesh up` tells the router of scheduling, and what it refuses before anything starts."""

import pytest

from kvmesh.cli.policy import policy_settings
from kvmesh.errors import InvalidArgument

PLAN = '{"phase": {"mixed-0": "prefill"}}'


def test_nothing_said_nothing_set():
    assert policy_settings(None, None) == {}


def test_a_plan_brings_its_policy_and_an_explicit_one_stays(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(PLAN)
    assert policy_settings(None, path) == {"KVMESH_POLICY": "plan", "KVMESH_PLAN": str(path)}
    assert policy_settings("hybrid", path)["KVMESH_POLICY"] == "hybrid"


def test_mixed_workers_are_scheduled_by_hybrid_unless_told_otherwise(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(PLAN)
    assert policy_settings(None, None, mixed=2) == {"KVMESH_POLICY": "hybrid"}
    assert policy_settings("chunked", None, mixed=2) == {"KVMESH_POLICY": "chunked"}
    assert policy_settings(None, path, mixed=2)["KVMESH_POLICY"] == "plan"


def test_bad_names_and_files_are_one_sentence(tmp_path):
    with pytest.raises(InvalidArgument, match="there is no policy 'x'; there is placement"):
        policy_settings("x", None)
    with pytest.raises(InvalidArgument, match="cannot be read"):
        policy_settings(None, tmp_path / "none.json")
    bad = tmp_path / "bad.json"
    bad.write_text("[]")
    with pytest.raises(InvalidArgument, match=r"bad\.json is no plan"):
        policy_settings(None, bad)
