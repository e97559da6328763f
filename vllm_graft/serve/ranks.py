"""Errors name their rank, and each rank must hold weights of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from vllm_graft.order import ORDER
from vllm_graft.parallel import ParallelContext

_SAMPLES = 256


@contextmanager
def naming_rank() -> Iterator[None]:
    """Let an error in the block say on which rank it happened, where there are several."""
    try:
        yield
    except Exception as error:
        if dist.is_initialized() and dist.get_world_size() > 1:
            error.add_note(f"This was rank {dist.get_rank()} of {dist.get_world_size()}.")
        raise


def check_ranks_differ(model: nn.Module, context: ParallelContext) -> None:
    """Refuse a model that every tensor-parallel rank holds whole. All ranks must call this.

    Raises:
        RuntimeError: the weights are identical on all ranks.
    """
    size, group = context.get_tensor_parallel_world_size(), context.get_tp_process_group()
    if size == 1 or group is None:
        return
    mine = torch.stack([_digest(parameter) for parameter in model.parameters()])
    theirs = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(theirs, mine, group=group)
    if all(torch.equal(theirs[0], other) for other in theirs[1:]):
        raise RuntimeError(
            f"tensor_parallel_size={size}, but the weights are identical on all ranks: tensor "
            "parallelism was not applied, or before the model was ready for it. In the factory: "
            f"{ORDER}"
        )


def _digest(parameter: torch.Tensor) -> torch.Tensor:
    """Two numbers that shards of one tensor do not share: its size, and a weighted sum."""
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    flat = local.detach().flatten()
    # vLLM's default dtype while it loads may be bfloat16.
    steps = torch.arange(_SAMPLES, device=flat.device, dtype=torch.float64)
    places = (steps * (max(flat.numel() - 1, 0) / (_SAMPLES - 1))).round().long()
    total = (flat[places].double() * (steps + 1)).sum() if flat.numel() else flat.sum().double()
    return torch.stack([total, torch.full_like(total, flat.numel())])
