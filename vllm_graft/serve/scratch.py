"""Blocks of a scratch KV cache for packed samples, as the training forward needs it.

Legend: T packed tokens, B samples, M most blocks of a sample.
"""

from __future__ import annotations

from functools import lru_cache

import torch


@lru_cache(maxsize=8)
def scratch_blocks(
    lengths: tuple[int, ...], block_size: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Give every sample blocks of its own.

    Kept, because every layer of a model asks for the same ones: do not write to them.

    Args:
        lengths: tokens of each of the B samples.
        block_size: tokens per block.

    Returns:
        Block table `[B, M]` int32, slot of every token `[T]` int64, number of
        blocks; on CPU.
    """
    sizes = torch.tensor(lengths, dtype=torch.int32)
    needed = (sizes + block_size - 1) // block_size
    first = torch.cumsum(needed, 0) - needed
    most, count = max(int(needed.max()), 1), max(int(needed.sum()), 1)
    table = (first[:, None] + torch.arange(most)).clamp_(max=count - 1).to(torch.int32)
    starts = (first * block_size).tolist()
    slots = torch.cat([torch.arange(n) + s for n, s in zip(lengths, starts, strict=True)])
    return table, slots, count
