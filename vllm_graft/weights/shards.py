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

Region = tuple["slice | torch.Tensor", ...]
"""A part of a tensor: for each dimension a slice, or indices (int64) in any order."""


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


def is_share(tensor: torch.Tensor) -> bool:
    """Whether this rank holds a part of the whole only."""
    return local(tensor).shape != whole_shape(tensor)


def region_of(tensor: torch.Tensor) -> tuple[slice, ...]:
    """The part of the whole that this rank's `tensor` is."""
    shape, start = tuple(tensor.shape), [0] * tensor.dim()
    shard = shard_of(tensor)
    if isinstance(tensor, DTensor):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        shape, first = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
        start = list(first)
    elif shard is not None:
        start[shard.dim] = shard.rank * shape[shard.dim]
    return tuple(slice(o, o + n) for o, n in zip(start, shape, strict=True))


def select(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    """A part of `tensor`, a view where the region has slices only."""
    part = tensor[tuple(i if isinstance(i, slice) else slice(None) for i in region)]
    for dim, index in enumerate(region):
        if isinstance(index, torch.Tensor):
            part = part[(slice(None),) * dim + (index,)]
    return part


def local(tensor: Any) -> torch.Tensor:
    """The plain tensor with this rank's values."""
    mine: torch.Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return mine


def agreed(tensor: torch.Tensor, fact: bool) -> bool:
    """Whether `fact` holds on all ranks with parts of `tensor`; each of them must call this."""
    if isinstance(tensor, DTensor):
        groups = tensor.device_mesh.get_all_groups()
    else:
        shard = shard_of(tensor)
        groups = [] if shard is None else [shard.group]
    flag = torch.tensor(int(fact), device=local(tensor).device)
    for group in groups:
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=group)
    return bool(flag)


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
    mine: torch.Tensor = tensor.detach()
    if shard is None:
        return mine
    parts = [torch.empty_like(mine) for _ in range(shard.count)]
    dist.all_gather(parts, mine.contiguous(), group=shard.group)
    return torch.cat(parts, dim=shard.dim)
