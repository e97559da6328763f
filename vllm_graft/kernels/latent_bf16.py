"""Latent attention in bf16 on processors with AVX-512, by a kernel that takes each query alone.

Several times as fast as the decode kernel that vLLM has for it (docs/performance.md), with the
same accuracy: scores from products of bf16 pairs, everything else in float32.

Legend: T queries, N heads, R latent rank, W width of the keys, B sequences, M blocks of each.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from vllm_graft.kernels.build import AVX512_BF16, load_operators


@functools.cache
def available() -> bool:
    """Whether this machine attends so, and the operator could be built."""
    fits = torch.cpu._is_avx512_bf16_supported()
    return fits and load_operators(Path(__file__).with_suffix(".cpp"), flags=AVX512_BF16)


def takes(q_TNW: torch.Tensor, rank: int) -> bool:
    """Whether the kernel takes these queries."""
    fits = rank % 16 == 0 and q_TNW.shape[-1] % 2 == 0
    return fits and q_TNW.dtype == torch.bfloat16 and available()


def attend(
    q_TNW: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    sequence: torch.Tensor,
    lengths: torch.Tensor,
    rank: int,
    scale: float,
) -> torch.Tensor:
    """Weighted latent vectors `[T, N, R]`; no gradient.

    Args:
        q_TNW: absorbed queries, the rotated part last.
        cache: `[blocks, 16, W]`; the first R numbers of a key are its value.
        block_table: `[B, M]` int32.
        sequence: `[T]` int64, the sequence of each query.
        lengths: `[T]` int32, at least 1: the keys that each sees.
        rank: R.
        scale: of the scores before the softmax.
    """
    out: torch.Tensor = torch.ops.vllm_graft.latent_bf16(
        q_TNW.contiguous(), cache, block_table.contiguous(), sequence, lengths, rank, scale
    )
    return out
