"""TorchTitan's experts divided among the tensor-parallel ranks: vLLM's expert parallelism.

Every rank has all tokens, so none travels. A rank runs the experts that it holds on the
tokens that chose them, and the sum over the ranks, which tensor parallelism makes at the
end of the layer, brings the outputs together. TorchTitan's own dispatchers are for ranks
that hold different tokens.

Imports nothing of TorchTitan at module level. Legend: R routed rows (sorted by expert),
D width, E experts of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vllm_graft.families.torchtitan_moe import expert_stacks


def check_expert_parallel(model: nn.Module, parallel_context: Any) -> None:
    """Raise if the experts of `model` cannot be divided as `parallel_context` says.

    Raises:
        ValueError: experts that the ranks cannot share, or none; ranks other than the
            tensor-parallel ones; configs sharded for TorchTitan's own dispatchers.
    """
    size = parallel_context.get_expert_parallel_world_size()
    ranks = parallel_context.get_tensor_parallel_world_size()
    if size not in (1, ranks):
        raise ValueError(
            f"expert_parallel_size={size} with tensor_parallel_size={ranks}: experts are divided "
            "among the tensor-parallel ranks only; use data_parallel_size=1"
        )
    stacks = expert_stacks(model)
    if ranks > 1:
        _refuse_dispatchers(stacks)
    if size > 1:
        _check_count(stacks, size)


def _refuse_dispatchers(stacks: dict[str, Any]) -> None:
    for name, experts in stacks.items():
        if "ep" in _axes(experts):
            raise ValueError(
                f"{name}: sharded with enable_ep=True, for ranks that hold different tokens; build "
                "the model with enable_ep=False and start vLLM with enable_expert_parallel=True"
            )


def _check_count(stacks: dict[str, Any], size: int) -> None:
    if not stacks:
        raise ValueError(
            f"expert_parallel_size={size}, but the model has no experts; leave out "
            "enable_expert_parallel"
        )
    for name, experts in stacks.items():
        if experts.num_experts % size:
            raise ValueError(
                f"{name}: num_experts={experts.num_experts} is not divisible by "
                f"expert_parallel_size={size}; leave out enable_expert_parallel"
            )


def _axes(experts: Any) -> set[str]:
    config = experts._sharding_config
    layouts = {} if config is None else config.state_shardings or {}
    return {axis for layout in layouts.values() for axis in layout.per_axis_spmd_types()}


def divide_experts(model: nn.Module, mesh: Any) -> None:
    """Give each rank of `mesh` whole experts; before `parallelize`, after the exact forwards."""
    import spmd_types as spmd
    from torchtitan.models.common.moe_sharding import expert_param_placement_dense
    from torchtitan.protocols.sharding import ShardingConfig

    layout = expert_param_placement_dense(tp_placement=spmd.S(0))
    for experts in expert_stacks(model).values():
        names = [name for name, _ in experts.named_parameters()]
        experts._sharding_config = ShardingConfig(state_shardings=dict.fromkeys(names, layout))
        count = experts.num_experts // mesh.size()
        first = mesh.get_local_rank() * count
        experts.forward = partial(_own_rows, experts.forward, first, first + count)


def _own_rows(
    forward: Callable[..., torch.Tensor],
    first: int,
    end: int,
    x_RD: torch.Tensor,
    counts_E: torch.Tensor,
) -> torch.Tensor:
    """Outputs `[R, D]` of the experts from `first` to before `end`; zeros in the others' rows."""
    borders = [0, *counts_E.cumsum(0).tolist()]
    start, stop = borders[first], borders[end]
    return F.pad(forward(x_RD[start:stop], counts_E[first:end]), (0, 0, start, len(x_RD) - stop))
