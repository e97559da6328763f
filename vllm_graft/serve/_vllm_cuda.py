"""vLLM's flash-attention op on CUDA (internals of vLLM, as `_vllm.py`).

Legend: T packed tokens, B samples, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

from functools import lru_cache

import torch

PAGE_SIZE = 16
"""vLLM's default block size on CUDA; the kernel's tiling depends on it."""


@lru_cache
def flash_version(*, head_dim: int) -> int | None:
    """The FlashAttention version that vLLM's backend picks here, or None for none."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return None
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    version: int | None = get_flash_attn_version(head_size=head_dim)
    return version


def paged_flash(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    window: tuple[int, int],
    *,
    causal: bool,
) -> torch.Tensor:
    """The op of vLLM over a scratch paged cache, as its FlashAttention backend calls it.

    `num_splits=1` is what the backend passes under `VLLM_BATCH_INVARIANT=1`.

    Args:
        q_TNH, k_TKH, v_TKH: flat tokens of all samples, on one CUDA device.
        cu_seqlens: `[B + 1]` int32 borders on CPU.
        scale: softmax scale.
        window: keys seen to the left and right of a query, itself not counted.
        causal: whether queries see only keys at or before them.

    Returns:
        `[T, N, H]`, without gradient.
    """
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    table, pages = _own_pages(lengths)
    slots = _slots(lengths, table).to(q_TNH.device, non_blocking=True)
    return flash_over_pages(
        q_TNH,
        _scatter(k_TKH, slots, pages),
        _scatter(v_TKH, slots, pages),
        table,
        lengths,
        cu_seqlens,
        scale,
        window,
        causal=causal,
    )


def flash_over_pages(
    q_TNH: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    window: tuple[int, int],
    *,
    causal: bool,
) -> torch.Tensor:
    """`paged_flash` over a cache that is there already.

    Args:
        q_TNH: `[T, N, H]` queries; those of a sample are its last tokens.
        k_pages, v_pages: `[pages, page size, K, H]`.
        table: `[B, M]` int32 pages of every sample, on CPU as the two below.
        lengths: `[B]` int32 tokens of every sample in the cache.
        cu_seqlens: `[B + 1]` int32 borders of the queries.
        scale: softmax scale.
        window: keys seen to the left and right of a query, itself not counted.
        causal: whether queries see only keys at or before them.

    Returns:
        `[T, N, H]`, without gradient.
    """
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    device = q_TNH.device
    out: torch.Tensor = flash_attn_varlen_func(
        q_TNH.contiguous(),
        k_pages,
        v_pages,
        max_seqlen_q=int((cu_seqlens[1:] - cu_seqlens[:-1]).max()),
        cu_seqlens_q=cu_seqlens.to(device, non_blocking=True),
        max_seqlen_k=int(lengths.max()),
        seqused_k=lengths.to(device, non_blocking=True),
        softmax_scale=scale,
        causal=causal,
        window_size=list(window),
        block_table=table.to(device, non_blocking=True),
        num_splits=1,
        fa_version=flash_version(head_dim=q_TNH.shape[-1]),
    )
    return out


def _own_pages(lengths: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Block table `[B, M]` int32 with pages of its own for every sample, and their number."""
    needed = (lengths + PAGE_SIZE - 1) // PAGE_SIZE
    first = torch.cumsum(needed, 0) - needed
    most, pages = max(int(needed.max()), 1), max(int(needed.sum()), 1)
    table = first[:, None] + torch.arange(most)
    return table.clamp_(max=pages - 1).to(torch.int32), pages


def _slots(lengths: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Cache slot of every token, `[T]` int64."""
    starts = table[:, 0].long() * PAGE_SIZE
    return torch.cat([torch.arange(n) + s for n, s in zip(lengths.tolist(), starts, strict=True)])


def _scatter(x_TKH: torch.Tensor, slots: torch.Tensor, pages: int) -> torch.Tensor:
    """Cache `[pages, page size, K, H]` that holds the tokens at their slots."""
    cache = x_TKH.new_zeros(pages * PAGE_SIZE, *x_TKH.shape[1:])
    cache.index_copy_(0, slots, x_TKH.contiguous())
    return cache.view(pages, PAGE_SIZE, *x_TKH.shape[1:])
