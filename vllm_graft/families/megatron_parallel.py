"""Process groups for Megatron's models, and their collectives on any device.

Megatron takes its groups as a collection; only tensor parallelism is run here, so every
other group is a stand-in for one rank. Its own collectives allocate on the CUDA device, and
one returns its input unreduced where that is not contiguous.

Imports nothing of Megatron at module level.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class OneRank:
    """A process group of one, without `torch.distributed`; nothing is ever sent through it."""

    def size(self) -> int:
        """Number of ranks."""
        return 1

    def rank(self) -> int:
        """This rank."""
        return 0


def tensor_parallel_group(parallel_context: Any) -> dist.ProcessGroup | None:
    """The group that Megatron's layers are sharded over; None for one rank.

    Args:
        parallel_context: from the factory; None for one rank.

    Raises:
        ValueError: several ranks, and no group of theirs. Megatron would build the whole model.
    """
    size = parallel_context.get_tensor_parallel_world_size() if parallel_context else 1
    if size == 1:
        return None
    group: dist.ProcessGroup | None = parallel_context.get_tp_process_group()
    if group is None:
        state = f"has {dist.get_world_size()}" if dist.is_initialized() else "is not initialized"
        raise ValueError(
            f"tensor_model_parallel_size={size} needs a process group of {size} ranks, but vLLM "
            f"has made none here and torch.distributed {state}. Let vLLM call the factory, run "
            f"`torchrun --nproc-per-node {size}` and torch.distributed.init_process_group() "
            "before it, or pass ParallelContext() for the whole model"
        )
    return group


def process_groups(tp: dist.ProcessGroup | None = None) -> Any:
    """Megatron's `ProcessGroupCollection` with the tensor-parallel group.

    Args:
        tp: from `tensor_parallel_group(parallel_context)`; None, or a group of one rank,
            needs no `torch.distributed`.

    Returns:
        For `GPTModel(..., pg_collection=...)`. No group is created.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection

    one = OneRank()
    alone = ("pp", "cp", "tp_cp", "ep", "expt_tp", "tp_ep", "dp", "dp_cp", "expt_dp")
    groups = dict.fromkeys(alone, one)
    several = tp is not None and dist.get_world_size(tp) > 1
    return ProcessGroupCollection(tp=tp if several else one, embd=None, pos_embd=None, **groups)


def copy_to(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The same tensor on every rank; gradients are summed over the ranks."""
    out: torch.Tensor = _CopyTo.apply(x, group)  # type: ignore[no-untyped-call]
    return out


def reduce(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum of `x` over the ranks; each gets the whole gradient."""
    out: torch.Tensor = _Reduce.apply(x, group)  # type: ignore[no-untyped-call]
    return out


def gather(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """`[..., M]` of every rank side by side; each gets its slice of the gradient."""
    out: torch.Tensor = _Gather.apply(x, group)  # type: ignore[no-untyped-call]
    return out


def sum_over(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum of `x` over the ranks, a new tensor without a gradient."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return sum_over(grad, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        return sum_over(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        pieces = [torch.empty_like(x.contiguous()) for _ in range(dist.get_world_size(group))]
        dist.all_gather(pieces, x.contiguous(), group=group)
        return torch.cat(pieces, dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        pieces = grad.chunk(dist.get_world_size(ctx.group), dim=-1)
        return pieces[dist.get_rank(ctx.group)].contiguous(), None
