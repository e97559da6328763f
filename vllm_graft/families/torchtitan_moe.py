"""TorchTitan 0.3: feed-forward layers, dense and mixture of experts, for any dtype and batch.

TorchTitan runs its experts in bf16 whatever the parameters are, its float32
expert products depend on the batch, and its router loses float32 on CPU.
`correct_feed_forward` gives those modules another forward; TorchTitan itself,
parameters and names stay as they are.

Imports nothing of TorchTitan at module level. Legend: B sequences, L length,
T tokens (B * L), D width, F hidden (feed-forward) width, E experts, K experts
per token, R routed rows (T * K, sorted by expert).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from vllm_graft import exact
from vllm_graft.experts import expert_products

_MOE = "torchtitan.models.common.moe"
"""Looked up where it is loaded already: without it, no model has modules of it."""


def correct_feed_forward(model: nn.Module) -> None:
    """Give TorchTitan's feed-forward layers, experts and routers a forward for any batch.

    A token's result then depends on that token only, experts run in the dtype
    of their parameters, and routers in float32. Subclasses that override what
    would be replaced are left alone.
    """
    for kind, forward, replaced in _corrected():
        for module in model.modules():
            if isinstance(module, kind) and _inherits(module, kind, replaced):
                module.forward = partial(forward, module)
    for router in routers(model).values():
        router.gate.forward = partial(_gate, router.gate)


def _corrected() -> Iterator[tuple[Any, Callable[..., Any], tuple[str, ...]]]:
    """TorchTitan's classes, the forward each gets, and the methods that it replaces."""
    feed_forward = sys.modules.get("torchtitan.models.common.feed_forward")
    moe = sys.modules.get(_MOE)
    if feed_forward is not None:
        yield feed_forward.FeedForward, _feed_forward, ("forward",)
    if moe is not None:
        limits = ("forward", "_get_node_limited_routing_scores")
        yield moe.TokenChoiceTopKRouter, _router, limits
        yield moe.GroupedExperts, _grouped_experts, ("forward", "_grouped_mm")


def _inherits(module: nn.Module, kind: Any, methods: tuple[str, ...]) -> bool:
    return all(getattr(type(module), name) is getattr(kind, name) for name in methods)


def routers(model: nn.Module) -> dict[str, Any]:
    """TorchTitan's routers in `model` by qualified name; outputs as in `route`."""
    moe = sys.modules.get(_MOE)
    kind = () if moe is None else moe.TokenChoiceTopKRouter
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def expert_stacks(model: nn.Module) -> dict[str, Any]:
    """TorchTitan's `GroupedExperts` in `model` by qualified name."""
    moe = sys.modules.get(_MOE)
    kind = () if moe is None else moe.GroupedExperts
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def _feed_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = module.w2(exact.silu(module.w1(x)) * module.w3(x))
    return out


def _gate(gate: Any, x: torch.Tensor) -> torch.Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    bias = None if gate.bias is None else gate.bias.to(dtype)
    return exact.linear(x.to(dtype), gate.weight.to(dtype), bias)


def _router(
    router: Any, x_BLD: torch.Tensor, expert_bias_E: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if router._debug_force_load_balance:
        routed: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = type(router).forward(
            router, x_BLD, expert_bias_E
        )
        return routed
    choose = torch.ops.vllm_graft.route if exact.compiled_serving() else route
    chosen: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = choose(
        router.gate(x_BLD),
        expert_bias_E,
        router.score_func,
        router.num_expert_groups,
        router.num_limited_groups,
        router.top_k,
        router.route_norm,
        router.route_scale,
    )
    return chosen


def route(
    logits_BLE: torch.Tensor,
    expert_bias_E: torch.Tensor | None,
    score_func: str,
    num_groups: int | None,
    num_limited_groups: int | None,
    top_k: int,
    normalize: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose `top_k` experts for every token (DeepSeek-V3 paper, section 2.1.2).

    Args:
        logits_BLE: float32 output of the gate.
        expert_bias_E: float32, added for the choice only, not to the scores.
        score_func: `"sigmoid"` or `"softmax"`.
        num_groups: of experts; None for one choice among all.
        num_limited_groups: only this many groups, those with the best two experts, are open.
        normalize: divide the chosen scores by their sum.
        scale: factor on the chosen scores.

    Returns:
        Chosen scores `[B, L, K]` float32, chosen experts `[B, L, K]` int64, all
        scores `[B, L, E]` float32.
    """
    softmax = score_func == "softmax"
    scores_BLE = logits_BLE.softmax(-1) if softmax else exact.sigmoid(logits_BLE)
    choice_BLE = scores_BLE if expert_bias_E is None else scores_BLE + expert_bias_E
    if num_groups is not None:
        choice_BLE = _open_groups(choice_BLE, num_groups, num_limited_groups)
    ids_BLK = choice_BLE.topk(top_k, dim=-1, sorted=False).indices
    chosen_BLK = scores_BLE.gather(-1, ids_BLK)
    if normalize:
        chosen_BLK = chosen_BLK / (chosen_BLK.sum(-1, keepdim=True) + 1e-20)
    return chosen_BLK * scale, ids_BLK, scores_BLE


def _open_groups(choice_BLE: torch.Tensor, groups: int, limit: int | None) -> torch.Tensor:
    """Scores with -inf for experts outside the `limit` best groups."""
    grouped = choice_BLE.unflatten(-1, (groups, -1))
    best = grouped.topk(2, dim=-1).values.sum(-1).topk(limit or groups, dim=-1).indices
    closed = torch.ones(grouped.shape[:-1], dtype=torch.bool, device=best.device)
    closed = closed.scatter(-1, best, False)
    limited: torch.Tensor = grouped.masked_fill(closed[..., None], float("-inf")).flatten(-2)
    return limited


def _grouped_experts(module: Any, x_RD: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """SwiGLU of every row with its expert's weights, in their dtype."""
    weight = module.w1_EFD
    if weight.is_cuda and weight.dtype == torch.bfloat16:
        out: torch.Tensor = type(module).forward(module, x_RD, counts_E)
        return out
    x = x_RD.to(weight.dtype)
    gate_RF, up_RF = expert_products(module, ("w1_EFD", "w3_EFD"), x, counts_E)
    hidden_RF = exact.silu(gate_RF) * up_RF
    [rows_RD] = expert_products(module, ("w2_EDF",), hidden_RF, counts_E)
    return rows_RD.to(x_RD.dtype)


exact.define_op(
    "route(Tensor logits, Tensor? bias, str score_func, int? groups, int? limited, int top_k, "
    "bool normalize, float scale) -> (Tensor, Tensor, Tensor)",
    route,
    lambda logits, bias, score_func, groups, limited, top_k, normalize, scale: (
        logits.new_empty(*logits.shape[:-1], top_k),
        logits.new_empty(*logits.shape[:-1], top_k, dtype=torch.int64),
        torch.empty_like(logits),
    ),
)
