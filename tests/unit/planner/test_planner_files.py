"""Helix's numbers are reproduced from its profiles, and bad input gets one sentence that names its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvmesh.errors import InvalidArgument, NotFound
from kvmesh.planner import catalogue, problem
from kvmesh.planner.profiles import interpolate, throughput_tables
from kvmesh.planner.world import SINK, SOURCE, Cluster, Host, Link, Workload
from tests.unit.planner.problems import SHARED, needs_shared

CONVERSATION = catalogue.workload("azure-conv")


def test_throughput_of_the_single_cluster() -> None:
    # helix's own profile code, for this mix
    tables = throughput_tables(catalogue.model("llama2-70b"), {"A100": 4, "L4": 8, "T4": 12}, CONVERSATION)
    assert tables["A100"][7] == pytest.approx(2045.641, abs=1e-3)
    assert tables["L4"][6] == pytest.approx(531.703, abs=1e-3)
    assert tables["T4"][3] == pytest.approx(757.853, abs=1e-3)


@needs_shared
@pytest.mark.parametrize(("ours", "theirs"), [("llama2-70b", "llama2_70b"), ("llama-30b", "llama1_30b")])
def test_every_throughput_table_of_helix(ours: str, theirs: str) -> None:
    mixes = json.loads((SHARED / "profiles" / "throughput_tables.json").read_text())[theirs]["mixes"]
    for mix in mixes.values():
        tables = throughput_tables(catalogue.model(ours), {m: t["count"] for m, t in mix.items()}, CONVERSATION)
        for machine, table in mix.items():
            assert tables[machine] == pytest.approx(list(table["tokens_per_s_by_layers_held"].values()), rel=1e-5)


def test_interpolation_goes_on_beyond_the_ends() -> None:
    points = [(0.0, 0.0), (10.0, 5.0), (20.0, 20.0)]
    assert [interpolate(points, x) for x in (0, 5, 10, 15, 20, 30)] == [0, 2.5, 5, 12.5, 20, 35]


def test_helix_clusters_have_links_of_bytes() -> None:
    cluster = catalogue.cluster("geo24")
    assert cluster.mix() == {"A100": 4, "L4": 8, "T4": 12}
    assert cluster.links[SOURCE, 0] == Link(14.2e6, 0.055)
    assert cluster.links[22, 23] == cluster.links[23, 22] == Link(1204e6, 0.001)
    assert (0, SINK) in cluster.links
    assert (SINK, 0) not in cluster.links


@pytest.mark.parametrize("name", catalogue.cluster_names())
def test_every_shipped_cluster_is_readable(name: str) -> None:
    assert catalogue.cluster(name).hosts


def test_example_cluster_in_yaml() -> None:
    cluster = catalogue.cluster("two-sites")
    names = [host.name for host in cluster.hosts]
    big, old, last = names.index("big-0"), names.index("old-0"), names.index("old-7")
    assert cluster.hosts[old].machine == "T4x2"
    assert cluster.hosts[old].memory_bytes == 32e9
    assert cluster.links[big, old].bytes_per_s == 0.125e9
    assert cluster.links[old, last].bytes_per_s == 1.25e9
    assert cluster.links[big, last].bytes_per_s == 0.025e9
    # the coordinator stands in the campus
    assert cluster.links[SOURCE, big].bytes_per_s == 1.25e9
    assert cluster.links[last, SINK].bytes_per_s == 0.025e9


def test_every_fault_of_a_yaml_cluster_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("name: x\nhosts:\n  - {name: a, accelerator: T4, replicas: 0}\n  - {accelerator: L4, speed: 3}\n")
    with pytest.raises(InvalidArgument) as error:
        catalogue.cluster(str(path))
    assert {field for field, _ in error.value.violations} == {
        "hosts.0.replicas", "hosts.1.name", "hosts.1.speed", "links",
    }  # fmt: skip
    assert "\n" not in str(error.value)


def test_hosts_and_regions_of_a_yaml_cluster_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "name: x\ncoordinator_region: moon\nhosts:\n  - {name: a, accelerator: T5}\n  - {name: a, accelerator: L4}\n"
        "links:\n  inside: {gigabytes_per_s: 1, milliseconds: 1}\n"
        "  pairs: [{between: [mars, a], gigabytes_per_s: 1, milliseconds: 1}]\n"
    )
    with pytest.raises(InvalidArgument) as error:
        catalogue.cluster(str(path))
    message = str(error.value)
    assert "host a appears more than once" in message
    assert "host a has accelerator 'T5'; known: A100-40G, " in message
    assert "coordinator_region 'moon' has no host; regions: default" in message
    assert "links.pairs.0 names 'mars'" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hosts: [", "is not YAML"),
        ("[]", "the document"),
    ],
)
def test_broken_yaml(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(InvalidArgument, match=message):
        catalogue.cluster(str(path))


def test_every_fault_of_an_ini_cluster_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.ini"
    path.write_text(
        "[NodeNames]\ntotal_compute_nodes=2\n[ComputeNode-0]\ntype=A900\n"
        "[Link-0-7]\nbandwidth=1 * gbps\nlatency=1 * MilliSec\n"
        "[Link-0-1]\nbandwidth=__import__('os')\nlatency=1 * fortnight\n"
    )
    with pytest.raises(InvalidArgument) as error:
        catalogue.cluster(str(path))
    assert {field for field, _ in error.value.violations} == {
        "[ComputeNode-0] type", "[ComputeNode-1] type", "[Link-0-7]", "[Link-0-1] bandwidth", "[Link-0-1] latency",
    }  # fmt: skip


def test_not_an_ini_file(tmp_path: Path) -> None:
    path = tmp_path / "c.ini"
    path.write_text("just words")
    with pytest.raises(InvalidArgument, match=r"is not an \.ini file"):
        catalogue.cluster(str(path))


@pytest.mark.parametrize("kind", ["cluster", "model", "workload"])
def test_unknown_names_list_the_known(kind: str) -> None:
    with pytest.raises(NotFound, match=f"no {kind} 'nonsense': known are .*, or name a file"):
        getattr(catalogue, kind)("nonsense")


def test_a_malformed_profile_names_its_field(tmp_path: Path) -> None:
    document = json.loads((catalogue.HELIX / "llama2-70b.json").read_text())
    document["machines"]["T4"]["prompt_ms"] = [[100, 5.0], [50, 3.0]]
    document["layers"] = 0
    path = tmp_path / "m.json"
    path.write_text(json.dumps(document))
    with pytest.raises(InvalidArgument) as error:
        catalogue.model(str(path))
    assert [field for field, _ in error.value.violations] == ["layers", "machines.T4.prompt_ms"]
    path.write_text("{")
    with pytest.raises(InvalidArgument, match="is not JSON"):
        catalogue.model(str(path))


def test_workload_from_lengths(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    for columns in ("input_tokens,output_tokens", "num_prefill_tokens,num_decode_tokens"):
        path.write_text(f"{columns}\n100,10\n300.0,30\n")
        assert catalogue.workload(str(path)) == Workload("mine", 200, 20, ((100, 10), (300, 30)))
    for text in ("a,b\n1,2\n", "input_tokens,output_tokens\n", "input_tokens,output_tokens\n1,x\n"):
        path.write_text(text)
        with pytest.raises(InvalidArgument, match="is not a CSV file with numbers"):
            catalogue.workload(str(path))


def refused(cluster: Cluster, model: str = "llama2-70b") -> str:
    with pytest.raises(InvalidArgument) as error:
        problem.build(cluster, catalogue.model(model), CONVERSATION)
    return str(error.value)


def linked(hosts: list[Host], groups: list[list[int]]) -> Cluster:
    """A cluster whose hosts are linked within groups, and all with the coordinator."""
    fast = Link(1e9, 0.001)
    links = {(u, v): fast for group in groups for u in group for v in group if u != v}
    for host in range(len(hosts)):
        links |= {(SOURCE, host): fast, (host, SINK): fast}
    return Cluster("c", tuple(hosts), links)


def test_a_model_that_fits_nowhere() -> None:
    message = refused(linked([Host("tiny", "T4", 16e9, 1e9)], [[0]]))
    assert message == (
        "cluster c cannot hold llama2-70b: half of the memory of its 1 hosts has room for 4 layers of 80"
        " (1.53 GB each; the largest host, tiny, has 16 GB)"
    )


def test_a_machine_without_profile() -> None:
    assert refused(linked([Host("odd", "H900", 80e9, 1e9)], [[0]])).startswith(
        "host odd is a H900, on which llama2-70b"
    )


def test_a_disconnected_region() -> None:
    hosts = [Host(f"h{i}", "A100", 40e9, 1e9) for i in range(8)]
    message = refused(linked(hosts, [[0, 1, 2, 3, 4], [5, 6, 7]]))
    assert message == (
        "host h5 has no link to the region of host h0, and the 5 hosts there have room for only 60 of 80 layers of"
        " llama2-70b"
    )


def test_a_host_beyond_the_coordinators_reach() -> None:
    cluster = linked([Host(f"h{i}", "A100", 40e9, 1e9) for i in range(8)], [list(range(7))])
    links = {edge: link for edge, link in cluster.links.items() if edge != (SOURCE, 7)}
    assert refused(Cluster("c", cluster.hosts, links)) == "host h7 cannot be reached from the coordinator over any link"


def test_a_slow_network_card_limits_throughput() -> None:
    hosts = [Host(f"h{i}", "A100", 40e9, 16384 * 100) for i in range(8)]
    task = problem.build(linked(hosts, [list(range(8))]), catalogue.model("llama2-70b"), CONVERSATION)
    assert set(task.throughput[0]) == {100.0}


def test_catalogued_accelerators_name_their_source() -> None:
    for accelerator in catalogue.accelerators().values():
        assert accelerator.source.startswith("https://")
        assert accelerator.resting_watts < accelerator.watts
