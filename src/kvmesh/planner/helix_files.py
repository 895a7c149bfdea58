"""Reads Helix's own files: clusters and machine profiles (.ini), and published placements.

Trap: their `mbps` and `gbps` are 1e6 and 1e9 *bytes*/s. Links without `source` or `sink` run both ways. Values such as
`12.5 * mbps` are parsed, never evaluated. Every fault of a file is named at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from configparser import ConfigParser
from configparser import Error as ParserError
from pathlib import Path

from kvmesh.errors import InvalidArgument
from kvmesh.planner.world import SINK, SOURCE, Cluster, Edge, Host, Link, Span

UNITS = {"": 1.0, "kbps": 1e3, "mbps": 1e6, "gbps": 1e9, "KB": 1e3, "MB": 1e6, "GB": 1e9, "Sec": 1.0, "MilliSec": 1e-3}
_QUANTITY = re.compile(r"\s*(-?\d+(?:\.\d+)?)\s*(?:\*\s*(\w+))?\s*")
_LINK = re.compile(r"Link-(source|\d+)-(sink|\d+)")
_NAMED_NODE = re.compile(r"compute_node_(\d+)")
_ENDS = {"source": SOURCE, "sink": SINK}


class _Faults(list[tuple[str, str]]):
    """Collects (field, what is wrong); `number` parses or records."""

    def number(self, parser: ConfigParser, section: str, key: str) -> float:
        text = parser.get(section, key, fallback="")
        match = _QUANTITY.fullmatch(text)
        if match and (match[2] or "") in UNITS:
            return float(match[1]) * UNITS[match[2] or ""]
        self.append((f"[{section}] {key}", f"is {text!r}, not a number with a unit" if text else "is missing"))
        return 0.0

    def check(self, path: Path) -> None:
        if self:
            raise InvalidArgument(f"{path}: " + "; ".join(f"{name} {text}" for name, text in self), self)


def read_cluster(path: Path, machines: Path) -> Cluster:
    """A cluster file, its hosts named by their indices, with memory and NIC from the `machines` profile file."""
    parser, types, faults = _parse(path), _parse(machines), _Faults()
    count = int(faults.number(parser, "NodeNames", "total_compute_nodes"))
    hosts = tuple(_host(i, parser, types, faults) for i in range(count))
    links = dict(_links(parser, count, faults))
    faults.check(path)
    return Cluster(path.stem, hosts, links)


def _host(index: int, parser: ConfigParser, types: ConfigParser, faults: _Faults) -> Host:
    section = f"ComputeNode-{index}"
    machine = parser.get(section, "type", fallback="")
    if machine not in types or machine in ("SourceNode", "SinkNode"):
        faults.append((f"[{section}] type", f"is {machine!r}, not a machine type" if machine else "is missing"))
        return Host(str(index), machine, 0.0, 0.0)
    nic = min(faults.number(types, machine, f"{way}_nic_speed") for way in ("inbound", "outbound"))
    return Host(str(index), machine, faults.number(types, machine, "vram_size"), nic)


def _links(parser: ConfigParser, hosts: int, faults: _Faults) -> Iterator[tuple[Edge, Link]]:
    for section in parser.sections():
        if not section.startswith("Link-"):
            continue
        match = _LINK.fullmatch(section)
        tail, head = (_ENDS[end] if end in _ENDS else int(end) for end in match.groups()) if match else (hosts, hosts)
        if max(tail, head) >= hosts:
            faults.append((f"[{section}]", f"does not join two of the {hosts} nodes"))
            continue
        link = Link(faults.number(parser, section, "bandwidth"), faults.number(parser, section, "latency"))
        yield (tail, head), link
        if tail >= 0 and head >= 0:
            yield (head, tail), link


def read_placement(path: Path) -> dict[int, Span]:
    """A published placement: host index to its span; hosts without layers are left out."""
    parser, faults = _parse(path), _Faults()
    offset = int(faults.number(parser, "Settings", "offset"))
    placement = dict(_spans(parser, offset, faults))
    faults.check(path)
    return placement


def read_flow(path: Path) -> dict[Edge, float]:
    """The links a published placement was simulated on, and the maximum flow over them, tokens/s by (tail, head)."""
    parser, faults = _parse(path), _Faults()
    keys = parser.options("Flow") if parser.has_section("Flow") else []
    flow = {
        (_ENDS.get(tail) or int(tail), _ENDS.get(head) or int(head)): faults.number(parser, "Flow", f"{tail}-{head}")
        for tail, head in (key.split("-") for key in keys)
    }
    faults.check(path)
    return flow


def _spans(parser: ConfigParser, offset: int, faults: _Faults) -> Iterator[tuple[int, Span]]:
    for key, text in parser["Solution"].items() if "Solution" in parser else ():
        node, layers = _NAMED_NODE.fullmatch(key), [int(number) for number in re.findall(r"\d+", text)]
        if not node or layers != list(range(layers[0], layers[0] + len(layers)) if layers else ()):
            faults.append((f"[Solution] {key}", "is not a list of consecutive layers"))
        elif layers:
            yield int(node[1]) - offset, (layers[0], layers[-1] + 1)


def _parse(path: Path) -> ConfigParser:
    parser = ConfigParser()
    try:
        parser.read_string(path.read_text(), str(path))
    except (ParserError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path} is not an .ini file: {' '.join(str(error).split())}") from None
    return parser
