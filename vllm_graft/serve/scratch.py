"""Where packed samples lie in the blocks of a KV cache.

Legend: T packed tokens, B samples, M most blocks of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

LATENT_RANK, LATENT_ROPE = 512, 64
"""DeepSeek's sizes, for which vLLM's latent kernels are compiled."""


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


def pad_latent(x: torch.Tensor, rank: int) -> torch.Tensor:
    """`[..., R + P]` at the kernels' own sizes, with zeros (which change nothing) between.

    Args:
        x: latent dims, then rotated ones.
        rank: R, at most `LATENT_RANK`; P is at most `LATENT_ROPE`.
    """
    latent, rope = x.split([rank, x.shape[-1] - rank], dim=-1)
    if (rank, rope.shape[-1]) == (LATENT_RANK, LATENT_ROPE):
        return x
    return torch.cat([pad_to(latent, LATENT_RANK), pad_to(rope, LATENT_ROPE)], dim=-1)


def pad_to(x: torch.Tensor, width: int) -> torch.Tensor:
    """Zeros after the last numbers of each row."""
    missing = width - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x


@dataclass(frozen=True, kw_only=True)
class LatentBatch:
    """What each token of a flat batch sees of a latent cache."""

    block_table: torch.Tensor
    """`[B, M]` int32 blocks of each sequence."""
    sequence: torch.Tensor
    """`[T]` int64, the sequence of each token."""
    lengths: torch.Tensor
    """`[T]` int32 keys that each token sees, itself included."""

    @classmethod
    def of(
        cls,
        query_start_loc: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor | None = None,
    ) -> LatentBatch:
        """From borders `[B + 1]` of the new tokens and lengths `[B]` with what is cached."""
        new = (query_start_loc[1:] - query_start_loc[:-1]).long()
        sequence = torch.repeat_interleave(torch.arange(len(new)), new)
        before = torch.zeros_like(new) if seq_lens is None else seq_lens.long() - new
        offsets = torch.arange(len(sequence)) - query_start_loc[:-1].long()[sequence]
        lengths = (before[sequence] + offsets + 1).to(torch.int32)
        return cls(block_table=block_table, sequence=sequence, lengths=lengths)
