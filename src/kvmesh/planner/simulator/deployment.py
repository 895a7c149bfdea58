"""What is simulated: instances with their latency models, the links between them, and the requests that come.

Frozen facts only; what happens to them is `simulation`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from math import inf

from kvmesh.planner.latency.api import Latency
from kvmesh.planner.world import Link, Phase
from kvmesh.types import BLOCK_TOKENS, Role, WorkerCapacity, WorkerInfo

HASH_TOKENS = 512
"""Tokens that one id of `Arrival.hashes` stands for, as in Mooncake's traces."""


class HandOver(StrEnum):
    """How KV gets from prefill to decode.

    PULL: the decode instance is chosen when the prompt is computed, and fetches once it has blocks; till then the
    prefill instance keeps its own (DistServe). DIRECT: it is chosen on arrival, and KV streams to it layer by layer
    while the prompt is computed (Splitwise); what comes before it has blocks waits at the prefill instance.
    """

    PULL = "pull"
    DIRECT = "direct"


@dataclass(frozen=True, slots=True)
class Instance:
    """One engine: `kv_tokens` of room, `token_budget` tokens an iteration, `max_running` sequences at once.

    A DECODE instance computes a prompt, too, if no prefill instance was chosen for it. `prefill_first`: decodes wait
    while prompts are computed, whole; a baseline.
    """

    name: str
    phase: Phase
    latency: Latency
    kv_tokens: int
    token_budget: int = 2048
    max_running: int = 1024
    region: str = ""
    prefill_first: bool = False

    @property
    def blocks(self) -> int:
        return max(1, self.kv_tokens // BLOCK_TOKENS)

    @property
    def worker(self) -> WorkerInfo:
        """How the instance looks to a policy."""
        capacity = WorkerCapacity(
            blocks=self.blocks, max_running=self.max_running, max_model_len=self.blocks * BLOCK_TOKENS
        )
        return WorkerInfo(self.name, 1, Role(self.phase), "", 0, capacity=capacity)


@dataclass(frozen=True, slots=True)
class Links:
    """Bandwidths and latencies between instances: `pairs` by (from, to), of names or regions, else `default`.

    Each pair of instances has its link to itself; `port_bytes_per_s` bounds what leaves or enters one instance.
    """

    default: Link
    pairs: Mapping[tuple[str, str], Link] = field(default_factory=dict)
    port_bytes_per_s: float = inf


@dataclass(frozen=True, slots=True)
class Deployment:
    """`codec_ratio`: bytes of KV over bytes on the wire. `layers`: pieces in which a prompt's KV is handed over."""

    instances: Sequence[Instance]
    links: Links = Links(Link(inf, 0.0))
    kv_bytes_per_token: float = 0.0
    codec_ratio: float = 1.0
    hand_over: HandOver = HandOver.PULL
    layers: int = 1
    max_waiting: int = 1 << 30

    def wire_bytes(self, tokens: int) -> float:
        return tokens * self.kv_bytes_per_token / self.codec_ratio


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request to come at `at` seconds. `hashes`: an id for each `hash_tokens` tokens of the prompt, the last for what
    remains; equal leading ids are equal leading tokens. Without ids nothing of the prompt is shared."""

    at: float
    prompt_tokens: int
    output_tokens: int
    hashes: tuple[int, ...] = ()
    tenant: str = ""
    hash_tokens: int = HASH_TOKENS
