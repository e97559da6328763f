"""Dense and mixture-of-experts layers in TorchTitan's words, for the examples beside this file."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Init = dict[str, Any]
"""A TorchTitan `param_init` for `weight`."""

_DENSE_NAMES = {
    "model.layers.{}.mlp.gate_proj.weight": "layers.{}.feed_forward.w1.weight",
    "model.layers.{}.mlp.up_proj.weight": "layers.{}.feed_forward.w3.weight",
    "model.layers.{}.mlp.down_proj.weight": "layers.{}.feed_forward.w2.weight",
}
_EXPERTS = "layers.{}.moe.routed_experts.inner_experts"
_MOE_NAMES = {
    "model.layers.{}.mlp.gate.weight": "layers.{}.moe.router.gate.weight",
    "model.layers.{}.mlp.experts.{}.gate_proj.weight": f"{_EXPERTS}.w1_EFD[{{}}]",
    "model.layers.{}.mlp.experts.{}.up_proj.weight": f"{_EXPERTS}.w3_EFD[{{}}]",
    "model.layers.{}.mlp.experts.{}.down_proj.weight": f"{_EXPERTS}.w2_EDF[{{}}]",
}


def feed_forward_names(sparse: Iterable[bool]) -> dict[str, str]:
    """Hugging Face names of feed-forward tensors to TorchTitan's.

    Args:
        sparse: for every layer, whether it has experts. A mapping may only name
            what the model has, so a kind that does not occur is left out.
    """
    kinds = set(sparse)
    return (_DENSE_NAMES if False in kinds else {}) | (_MOE_NAMES if True in kinds else {})


def moe_config(
    *,
    dim: int,
    hidden_dim: int,
    num_experts: int,
    top_k: int,
    init: Init,
    score_func: str,
    route_norm: bool,
    route_scale: float = 1.0,
    expert_groups: tuple[int, int] | None = None,
    shared_hidden_dim: int = 0,
    router_bias: bool = False,
) -> Any:
    """TorchTitan's `MoE.Config`.

    Args:
        dim: D, width of the model; hidden_dim: F, of one expert.
        num_experts: E; top_k: K, experts per token.
        init: initial values of all weights.
        score_func: `"softmax"` or `"sigmoid"`.
        route_norm: divide the chosen scores by their sum.
        route_scale: factor on the chosen scores.
        expert_groups: `(groups, open groups)` for group-limited routing; None without.
        shared_hidden_dim: F of all shared experts together; 0 for none.
        router_bias: whether the checkpoint has a bias for the choice of experts.
    """
    from torchtitan.models.common import config_utils as titan

    groups, open_groups = expert_groups or (None, None)
    sizes: dict[str, int] = {"dim": dim, "num_experts": num_experts, "top_k": top_k}
    return titan.make_moe_config(
        num_experts=num_experts,
        router=titan.make_router_config(
            **sizes,
            gate_param_init=init,
            score_func=score_func,  # type: ignore[arg-type]
            route_norm=route_norm,
            route_scale=route_scale,
            num_expert_groups=groups,
            num_limited_groups=open_groups,
        ),
        routed_experts=titan.make_routed_experts_config(
            **sizes,
            hidden_dim=hidden_dim,
            param_init=dict.fromkeys(("w1_EFD", "w2_EDF", "w3_EFD"), init["weight"]),
            comm_backend="standard",
        ),
        shared_experts=ffn_config(dim, shared_hidden_dim, init) if shared_hidden_dim else None,
        # TorchTitan makes the bias buffer only where it would also update it in training.
        load_balance_coeff=1e-3 if router_bias else None,
    )


def ffn_config(dim: int, hidden_dim: int, init: Init) -> Any:
    """TorchTitan's `FeedForward.Config`: SwiGLU of width `hidden_dim`."""
    from torchtitan.models.common.config_utils import make_ffn_config

    return make_ffn_config(dim=dim, hidden_dim=hidden_dim, w1_param_init=init, w2w3_param_init=init)
