"""A network namespace behind a link of a chosen rate: veth and a token bucket (`tc tbf`). Needs root.

    with SlowLink() as link:
        link.limit(100e6)
        subprocess.Popen([*link.inside, "command"])

Whatever ends the block (an error and Ctrl-C included) removes all of it, the namespace with its half of the pair.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Self

LARGEST_PACKET = 64 << 10
"""Bytes that segmentation offload hands to the bucket at once."""


def problem() -> str:
    """Why there can be no such link here; empty if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    return f"{' and '.join(missing)} of iproute2 not found" if missing else ""


class SlowLink:
    """`outside` and `within`: the addresses of its ends; `inside`: what begins a command that runs within."""

    def __init__(self, number: int = 77) -> None:
        tag = f"kvb{os.getpid() % 100_000}"
        self._space, self._ends = f"{tag}-ns", (f"{tag}o", f"{tag}i")
        self.outside, self.within = f"10.213.{number}.1", f"10.213.{number}.2"
        self.inside = ("ip", "netns", "exec", self._space)

    def __enter__(self) -> Self:
        outer, inner = self._ends
        try:
            _run("ip", "netns", "add", self._space)
            _run("ip", "link", "add", outer, "type", "veth", "peer", "name", inner)
            _run("ip", "link", "set", inner, "netns", self._space)
            _run("ip", "addr", "add", f"{self.outside}/24", "dev", outer)
            _run("ip", "link", "set", outer, "up")
            _run(*self.inside, "ip", "addr", "add", f"{self.within}/24", "dev", inner)
            _run(*self.inside, "ip", "link", "set", inner, "up")
            _run(*self.inside, "ip", "link", "set", "lo", "up")
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def limit(self, bits_per_second: float | None) -> None:
        """Of both directions; None lifts it."""
        for where, end in (((), self._ends[0]), (self.inside, self._ends[1])):
            if bits_per_second is None:
                subprocess.run([*where, "tc", "qdisc", "del", "dev", end, "root"], capture_output=True, check=False)
                continue
            burst = max(2 * LARGEST_PACKET, int(bits_per_second / 8 * 0.004))
            rate, queue = f"{int(bits_per_second)}bit", ("latency", "200ms")
            _run(*where, "tc", "qdisc", "replace", "dev", end, "root", "tbf", "rate", rate, "burst", str(burst), *queue)

    def remove(self) -> None:
        """Idempotent."""
        for command in (("ip", "link", "del", self._ends[0]), ("ip", "netns", "del", self._space)):
            subprocess.run(command, capture_output=True, check=False)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
