"""The shape of a mixture of experts, read from a Hugging Face `config.json`. Knows no tensor and no file.

Mixtral (arXiv 2401.04088), Qwen2-MoE and Qwen3-MoE, OLMoE (arXiv 2409.02060), DeepSeek-V2 (arXiv 2405.04434) and
DeepSeek-V3 (arXiv 2412.19437).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kvmesh.errors import InvalidArgument

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3")


@dataclass(frozen=True, slots=True)
class Routing:
    """How a token chooses `active` of the experts and weighs them.

    `groups` of neighbouring experts compete first, by their best expert or, if `biased`, by the sum of their best two:
    only the experts of `active_groups` remain. `biased`: a learned bias takes part in the choice but not in the weight.
    Weights are renormalised to a sum of 1 if asked, then multiplied by `scale`.
    """

    active: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalised: bool = False
    scale: float = 1.0
    groups: int = 1
    active_groups: int = 1
    biased: bool = False


@dataclass(frozen=True, slots=True)
class Experts:
    """`sparse` has one entry per layer: whether its feed-forward is a mixture. `shared_size` is 0 without shared ones.

    `shared_gated`: the shared expert's output is multiplied by the sigmoid of a learned score (Qwen2-MoE).
    """

    count: int
    intermediate_size: int
    routing: Routing
    sparse: tuple[bool, ...]
    shared_size: int = 0
    shared_gated: bool = False


def read_experts(config: Mapping[str, Any]) -> Experts | None:
    """The mixture of a model, None if it is dense.

    Raises:
        InvalidArgument: fields that do not fit together, or a way of routing that is not supported.
        KeyError: a missing field.
    """
    if (family := config["model_type"]) not in FAMILIES:
        return None
    if family.startswith("deepseek"):
        return _check(_deepseek(family, config))
    if family == "mixtral":
        return _check(_mixtral(config))
    return _check(_qwen_like(family, config))


def _mixtral(config: Mapping[str, Any]) -> Experts:
    routing = Routing(config["num_experts_per_tok"], renormalised=True)
    sparse = (True,) * config["num_hidden_layers"]
    return Experts(config["num_local_experts"], config["intermediate_size"], routing, sparse)


def _qwen_like(family: str, config: Mapping[str, Any]) -> Experts:
    dense, step = config.get("mlp_only_layers") or (), config.get("decoder_sparse_step", 1)
    layers = range(config["num_hidden_layers"])
    shared = config["shared_expert_intermediate_size"] if family == "qwen2_moe" else 0
    return Experts(
        count=config.get("num_local_experts") or config["num_experts"],
        intermediate_size=config["intermediate_size" if family == "olmoe" else "moe_intermediate_size"],
        routing=Routing(config["num_experts_per_tok"], renormalised=bool(config.get("norm_topk_prob", False))),
        sparse=tuple(layer not in dense and (layer + 1) % step == 0 for layer in layers),
        shared_size=shared,
        shared_gated=shared > 0,
    )


def _deepseek(family: str, config: Mapping[str, Any]) -> Experts:
    inner, first = config["moe_intermediate_size"], config.get("first_k_dense_replace") or 0
    return Experts(
        count=config["n_routed_experts"],
        intermediate_size=inner,
        routing=_deepseek_v2_routing(config) if family == "deepseek_v2" else _deepseek_v3_routing(config),
        sparse=tuple(layer >= first for layer in range(config["num_hidden_layers"])),
        shared_size=inner * (config.get("n_shared_experts") or 0),
    )


def _deepseek_v2_routing(config: Mapping[str, Any]) -> Routing:
    method = config.get("topk_method") or "greedy"
    if method not in ("greedy", "group_limited_greedy"):
        raise InvalidArgument(f"topk_method={method!r} is not supported")
    if config.get("norm_topk_prob"):
        raise InvalidArgument("norm_topk_prob is not supported for deepseek_v2")
    grouped = method == "group_limited_greedy"
    return Routing(
        active=config["num_experts_per_tok"],
        scale=float(config.get("routed_scaling_factor", 1.0)),
        groups=config["n_group"] if grouped else 1,
        active_groups=config["topk_group"] if grouped else 1,
    )


def _deepseek_v3_routing(config: Mapping[str, Any]) -> Routing:
    return Routing(
        active=config["num_experts_per_tok"],
        score="sigmoid",
        renormalised=bool(config.get("norm_topk_prob", True)),
        scale=float(config.get("routed_scaling_factor", 1.0)),
        groups=config.get("n_group") or 1,
        active_groups=config.get("topk_group") or 1,
        biased=True,
    )


def _check(experts: Experts) -> Experts:
    routing = experts.routing
    if experts.count % routing.groups or not 1 <= routing.active_groups <= routing.groups:
        raise InvalidArgument(f"{experts.count} experts cannot be {routing.active_groups} of {routing.groups} groups")
    if not 1 <= routing.active <= experts.count // routing.groups * routing.active_groups:
        raise InvalidArgument(f"a token cannot choose {routing.active} experts of those that routing leaves")
    return experts
