"""The shape of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), from `config.json`. Knows no tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvmesh.engine.models.rope_config import scaling_of, yarn_mscale

FAMILIES = ("deepseek_v2", "deepseek_v3")


@dataclass(frozen=True, slots=True)
class Latent:
    """Per token and layer the cache holds `rank` numbers that all heads expand, and `rope_dim` that carry position.

    A head's query and key have `nope_dim` + `rope_dim` dimensions, its value has `value_dim`. `query_rank`: queries are
    projected through so many dimensions, or at once if None. `interleaved`: rotary pairs are neighbours in the weights.
    """

    rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int
    query_rank: int | None
    interleaved: bool
    scale: float
    """What scores are multiplied by, YaRN's temperature included."""

    @property
    def head_dim(self) -> int:
        """Of a query or key before it is absorbed into the latent space."""
        return self.nope_dim + self.rope_dim

    @property
    def entry_dim(self) -> int:
        """Numbers that the cache holds per token and layer."""
        return self.rank + self.rope_dim


def read_latent(config: Mapping[str, Any]) -> Latent | None:
    """The latent attention of a model, None if it has none; raises KeyError for a missing field."""
    if config["model_type"] not in FAMILIES:
        return None
    nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    return Latent(
        rank=config["kv_lora_rank"],
        rope_dim=rope,
        nope_dim=nope,
        value_dim=config["v_head_dim"],
        query_rank=config.get("q_lora_rank"),
        interleaved=bool(config.get("rope_interleave", True)),
        scale=_temperature(config) ** 2 / (nope + rope) ** 0.5,
    )


def _temperature(config: Mapping[str, Any]) -> float:
    scaling = scaling_of(config)
    weight = scaling.get("mscale_all_dim") or 0.0
    return yarn_mscale(scaling["factor"], weight) if weight else 1.0
