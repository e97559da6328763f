"""Tensor parallelism: each rank's attention has its share of the heads."""

from __future__ import annotations

from typing import Any

from torch import nn

from vllm_graft.attention.core import CoreAttention
from vllm_graft.attention.mla import TrainableMLA
from vllm_graft.order import ORDER


def shard_attention(model: nn.Module, tp_size: int) -> None:
    """Tell every attention of `model` that this rank has one of `tp_size` shares of its heads.

    The adapter does this for a model that does not do it itself. A second
    call with the same size changes nothing.

    Raises:
        ValueError: head counts that `tp_size` does not divide, before anything changed.
    """
    found: list[tuple[str, Any]] = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, (CoreAttention, TrainableMLA)) and module.tp_size != tp_size
    ]
    for name, module in found:
        for count, heads in module.head_counts().items():
            if heads % tp_size or module.tp_size != 1:
                raise ValueError(
                    f"{name}: {count}={heads} cannot be divided among tensor_parallel_size="
                    f"{tp_size} ranks, each of which keeps a share of the heads ({ORDER}); use a "
                    "tensor_parallel_size that divides it"
                )
    for _, module in found:
        module.shard(tp_size)
