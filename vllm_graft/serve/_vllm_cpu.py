"""The CPU attention kernel of vLLM, for the training forward (internals of vLLM, as `_vllm.py`).

Legend: T packed tokens, B samples, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

import functools

import torch

from vllm_graft.serve.scratch import scratch_blocks

_BLOCK_SIZE = 128  # vLLM's default block size on CPU; the result does not depend on it.


@functools.cache
def supports(*, head_size: int, dtype: torch.dtype) -> bool:
    """Whether vLLM's CPU attention kernel takes this head size and dtype."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return False
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend as Backend

    sizes = Backend.get_supported_head_sizes()
    return head_size in sizes and dtype in Backend.supported_dtypes


def paged_attention(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    *,
    causal: bool,
    sliding_window: int | None,
) -> torch.Tensor:
    """The engine's attention kernel over a scratch KV cache, without gradient.

    Args:
        q_TNH, k_TKH, v_TKH: flat tokens of all samples.
        cu_seqlens: `[B + 1]` int32 borders of the samples.

    Returns:
        `[T, N, H]`, bit-equal to what the engine computes for the same tokens.
    """
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    (_, num_heads, head_size), num_kv_heads = q_TNH.shape, k_TKH.shape[1]
    window = -1 if sliding_window is None else sliding_window
    isa = _get_attn_isa(q_TNH.dtype, _BLOCK_SIZE, head_size)
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    block_table, slots, num_blocks = scratch_blocks(tuple(lengths.tolist()), _BLOCK_SIZE)
    cache = q_TNH.new_zeros(num_blocks, num_kv_heads, 2 * _BLOCK_SIZE, head_size)
    key_cache, value_cache = cache.chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(
        k_TKH.contiguous(), v_TKH.contiguous(), key_cache, value_cache, slots, isa
    )
    schedule = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(lengths),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_size,
        seq_lens=lengths,
        dtype=q_TNH.dtype,
        query_start_loc=cu_seqlens,
        causal=causal,
        sliding_window_size=window,
        isa=isa,
        enable_kv_split=False,
    )
    out = torch.empty_like(q_TNH, memory_format=torch.contiguous_format)
    ops.cpu_attention_with_kv_cache(
        query=q_TNH.contiguous(),
        key_cache=key_cache,
        value_cache=value_cache,
        output=out,
        query_start_loc=cu_seqlens,
        seq_lens=lengths,
        scale=scale,
        causal=causal,
        alibi_slopes=None,
        sliding_window=window,
        block_table=block_table,
        softcap=0.0,
        scheduler_metadata=schedule,
        s_aux=None,
    )
    return out
