"""Which part of a whole parameter a rank's plain local tensor is.

DTensor says so itself. Parallelism that keeps plain tensors (TorchTitan's
default, Megatron) is noted on the tensor, where loading and export find it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

_ATTRIBUTE = "graft_shard"


@dataclass(frozen=True)
class Shard:
    """An even share of dimension `dim`: share number `rank` of the ranks of `group`."""

    dim: int
    rank: int
    group: Any

    @property
    def count(self) -> int:
        """Number of shares."""
        return int(dist.get_world_size(self.group))


def mark_shard(tensor: Any, shard: Shard) -> None:
    """Note that `tensor` is a share of a whole."""
    setattr(tensor, _ATTRIBUTE, shard)


def shard_of(tensor: torch.Tensor) -> Shard | None:
    """The share that `tensor` is, None for a whole tensor."""
    return getattr(tensor, _ATTRIBUTE, None)


def whole_shape(tensor: torch.Tensor) -> torch.Size:
    """The shape before sharding."""
    shard = shard_of(tensor)
    if shard is None:
        return tensor.shape
    shape = list(tensor.shape)
    shape[shard.dim] *= shard.count
    return torch.Size(shape)


def cut(whole: torch.Tensor, shard: Shard) -> torch.Tensor:
    """This rank's share of `whole`, a view."""
    size = whole.shape[shard.dim] // shard.count
    return whole.narrow(shard.dim, shard.rank * size, size)


def rows_of(tensor: torch.Tensor) -> int:
    """Rows (dim 0) of the whole tensor; 1 for a scalar."""
    shape = whole_shape(tensor)
    return shape[0] if shape else 1


@torch.no_grad()
def whole(tensor: Any) -> torch.Tensor:
    """The whole tensor, detached, from the shares of all ranks; every rank must call this."""
    if isinstance(tensor, DTensor):
        full: Any = tensor.full_tensor()
        return cast("torch.Tensor", full.detach())
    shard = shard_of(tensor)
    local: torch.Tensor = tensor.detach()
    if shard is None:
        return local
    parts = [torch.empty_like(local) for _ in range(shard.count)]
    dist.all_gather(parts, local.contiguous(), group=shard.group)
    return torch.cat(parts, dim=shard.dim)
