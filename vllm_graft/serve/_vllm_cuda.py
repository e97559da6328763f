"""Flash-attention ops and batch-invariant products of vLLM on CUDA (its internals, as `_vllm.py`).

Every call passes `num_splits=1`, which is what vLLM's backends pass under
`VLLM_BATCH_INVARIANT=1`.

Legend: T packed tokens, B samples, N query heads, K key/value heads, H head dim,
R latent rank, P rope dims.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from vllm_graft.serve.scratch import LATENT_RANK, LATENT_ROPE, pad_latent, scratch_blocks

PAGE_SIZE = 16
"""vLLM's default block size on CUDA; the kernel's tiling depends on it."""


def switch_on_batch_invariance() -> None:
    """What a worker of vLLM does at its start under `VLLM_BATCH_INVARIANT=1`. Idempotent.

    Relies on `init_batch_invariance`, which does nothing without the variable (0.32).
    """
    from vllm.model_executor.determinism.batch_invariant import init_batch_invariance

    init_batch_invariance()


@lru_cache
def flash_version(*, head_dim: int) -> int | None:
    """The FlashAttention version that vLLM's backend picks here, or None for none."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return None
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    version: int | None = get_flash_attn_version(head_size=head_dim)
    return version


class Layout(NamedTuple):
    """Where the tokens of some samples lie in a paged cache; tensors on the device."""

    cu_seqlens: torch.Tensor
    """`[B + 1]` int32 borders of the queries."""
    lengths: torch.Tensor
    """`[B]` int32 cached tokens of every sample, its queries (the last ones) included."""
    table: torch.Tensor
    """`[B, M]` int32 pages of every sample."""
    max_q: int
    """Most queries and, below, most cached tokens of a sample."""
    max_k: int


def paged_flash(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    window: tuple[int, int],
    *,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to packed samples as the engine does: over a (scratch) paged cache.

    Args:
        q_TNH: `[T, N, H]`; k_TKH, v_TKH: `[T, K, H]`, on one CUDA device.
        cu_seqlens: `[B + 1]` int32 borders on CPU.
        scale: softmax scale.
        window: keys seen to the left and right of a query, itself not counted.
        causal: whether queries see only keys at or before them.

    Returns:
        Output `[T, N, H]` and the log of the softmax sums, `[N, T]` float32;
        neither has a gradient.
    """
    lengths = tuple((cu_seqlens[1:] - cu_seqlens[:-1]).tolist())
    layout, slots, pages = _scratch(lengths, q_TNH.device)
    k_pages, v_pages = (_scatter(x, slots, pages) for x in (k_TKH, v_TKH))
    return flash_over_pages(q_TNH, k_pages, v_pages, layout, scale, window, causal=causal)


def flash_over_pages(
    q_TNH: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    layout: Layout,
    scale: float,
    window: tuple[int, int],
    *,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`paged_flash` over a cache that is there already.

    `k_pages` and `v_pages` are `[pages, page size, K, H]`; the rest is as there.
    """
    version = flash_version(head_dim=q_TNH.shape[-1])
    return _flash(
        q_TNH, k_pages, v_pages, layout, scale, version, causal=causal, window_size=list(window)
    )


def latent_flash_over_pages(
    q_TNR: torch.Tensor, latent_pages: torch.Tensor, rank: int, layout: Layout, scale: float
) -> torch.Tensor:
    """Causal MLA in the latent space, as vLLM's `FLASH_ATTN_MLA` backend decodes on Hopper.

    Args:
        q_TNR: `[T, N, R + P]`: queries times the key up-projection, then their rotated part.
        latent_pages: `[pages, page size, R + P]` compressed keys and values, then rotated keys.
        rank: R.
        layout: as in `flash_over_pages`.
        scale: softmax scale.

    Returns:
        `[T, N, R]`, still to be multiplied by the value up-projection; without gradient.
    """
    latent, rotated = latent_pages.unsqueeze(-2).tensor_split((rank,), dim=-1)
    q_latent, q_rotated = q_TNR.tensor_split((rank,), dim=-1)
    out, _ = _flash(q_rotated, rotated, latent, layout, scale, 3, causal=True, q_v=q_latent)
    return out


@lru_cache
def why_no_latent(*, kv_lora_rank: int, qk_rope_head_dim: int, dtype: torch.dtype) -> str | None:
    """Why `latent_attention` cannot run on this card; None where it can."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.fa_utils import flash_attn_supports_mla

    if kv_lora_rank > LATENT_RANK or qk_rope_head_dim > LATENT_ROPE:
        return (
            f"kv_lora_rank={kv_lora_rank}, qk_rope_head_dim={qk_rope_head_dim}: the kernel takes "
            f"{LATENT_RANK} and {LATENT_ROPE} at the most"
        )
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{dtype}: the kernel takes bfloat16 and float16"
    if not (current_platform.is_cuda() and flash_attn_supports_mla()):
        return (
            "the kernel is part of vLLM's FlashAttention 3, for NVIDIA cards of compute "
            "capability 9 (H100, H200)"
        )
    return None


def supports_latent(*, kv_lora_rank: int, qk_rope_head_dim: int, dtype: torch.dtype) -> bool:
    """Whether training runs the engine's latent kernel: elsewhere no bits are equal anyway."""
    from vllm import envs

    sizes = {"kv_lora_rank": kv_lora_rank, "qk_rope_head_dim": qk_rope_head_dim}
    return bool(envs.VLLM_BATCH_INVARIANT) and why_no_latent(**sizes, dtype=dtype) is None


def latent_over_scratch(
    kv_c_TR: torch.Tensor, k_pe_TP: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> Callable[[torch.Tensor], torch.Tensor]:
    """`latent_attention` of absorbed queries `[T, N, R + P]` to these tokens, packed samples."""
    rank = kv_c_TR.shape[-1]
    lengths = tuple((cu_seqlens[1:] - cu_seqlens[:-1]).tolist())
    layout, slots, count = _scratch(lengths, kv_c_TR.device)
    rows = pad_latent(torch.cat([kv_c_TR, k_pe_TP], dim=-1), rank)
    pages = _scatter(rows, slots, count)
    return lambda query: latent_attention(query, pages, layout, scale, rank)


def latent_attention(
    q_TNC: torch.Tensor, pages: torch.Tensor, layout: Layout, scale: float, rank: int
) -> torch.Tensor:
    """Attention in the latent space: one arithmetic for prefill, decode and training.

    Args:
        q_TNC: `[T, N, R + P]` absorbed queries.
        pages: `[pages, PAGE_SIZE, LATENT_RANK + LATENT_ROPE]`, narrower vectors padded.
        rank: R; the rest as in `latent_flash_over_pages`.

    Returns:
        `[T, N, R]`, without gradient.
    """
    query = pad_latent(q_TNC, rank)
    return latent_flash_over_pages(query, pages, LATENT_RANK, layout, scale)[..., :rank]


def _flash(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    layout: Layout,
    scale: float,
    version: int | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    out, lse = flash_attn_varlen_func(
        q,
        k_pages,
        v_pages,
        max_seqlen_q=layout.max_q,
        cu_seqlens_q=layout.cu_seqlens,
        max_seqlen_k=layout.max_k,
        seqused_k=layout.lengths,
        softmax_scale=scale,
        block_table=layout.table,
        return_softmax_lse=True,
        num_splits=1,
        fa_version=version,
        **options,
    )
    return out, lse


@lru_cache(maxsize=8)
def _scratch(lengths: tuple[int, ...], device: torch.device) -> tuple[Layout, torch.Tensor, int]:
    """Layout of whole samples in pages of their own, slot of every token `[T]`, number of pages.

    Kept, because every layer of a model asks for the same one.
    """
    table, slots, pages = scratch_blocks(lengths, PAGE_SIZE)
    sizes = torch.tensor(lengths, dtype=torch.int32)
    borders = torch.cat([torch.zeros(1), sizes.cumsum(0)]).to(torch.int32)
    borders, sizes, table = (x.to(device) for x in (borders, sizes, table))
    layout = Layout(borders, sizes, table, max(lengths), max(lengths))
    return layout, slots.to(device), pages


def _scatter(x_TKH: torch.Tensor, slots: torch.Tensor, pages: int) -> torch.Tensor:
    """Cache `[pages, page size, K, H]` that holds the tokens at their slots."""
    cache = x_TKH.new_zeros(pages * PAGE_SIZE, *x_TKH.shape[1:])
    cache.index_copy_(0, slots, x_TKH.contiguous())
    return cache.view(pages, PAGE_SIZE, *x_TKH.shape[1:])
