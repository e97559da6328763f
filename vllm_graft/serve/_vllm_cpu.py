"""vLLM's CPU attention kernels, for the training forward (internals of vLLM, as `_vllm.py`).

Legend: T packed tokens, B samples, N query heads, K key/value heads, H head dim,
R latent rank, P rope dims.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from vllm_graft.attention.kernels import AttentionSpec
from vllm_graft.kernels import latent_bf16
from vllm_graft.serve.scratch import (
    LATENT_RANK,
    LATENT_ROPE,
    LatentBatch,
    pad_latent,
    scratch_blocks,
)

_BLOCK_SIZE = 128  # vLLM's default block size on CPU; the result does not depend on it.
LATENT_BLOCK_SIZE = 16


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
    spec: AttentionSpec,
    sinks_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """The engine's attention kernel over a scratch KV cache, without gradient.

    Args:
        q_TNH, k_TKH, v_TKH: flat tokens of all samples.
        cu_seqlens: `[B + 1]` int32 borders of the samples.
        spec: scale, causality, window, softcap, ALiBi.
        sinks_N: `[N]`, or None.

    Returns:
        `[T, N, H]`, bit-equal to what the engine computes for the same tokens.
    """
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    (_, num_heads, head_size), num_kv_heads = q_TNH.shape, k_TKH.shape[1]
    isa = _get_attn_isa(q_TNH.dtype, _BLOCK_SIZE, head_size)
    if isa == "amx":
        _ask_for_amx()
    few = few_queries(num_heads, num_kv_heads) if spec.causal else None
    requests = _requests(tuple(cu_seqlens.diff().tolist()), _BLOCK_SIZE, few)
    cache = q_TNH.new_zeros(requests.num_blocks, num_kv_heads, 2 * _BLOCK_SIZE, head_size)
    key_cache, value_cache = cache.chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(
        k_TKH.contiguous(), v_TKH.contiguous(), key_cache, value_cache, requests.slots, isa
    )
    out = torch.empty_like(q_TNH, memory_format=torch.contiguous_format)
    ops.cpu_attention_with_kv_cache(
        query=q_TNH.contiguous(),
        key_cache=key_cache,
        value_cache=value_cache,
        output=out,
        query_start_loc=requests.borders,
        seq_lens=requests.lengths,
        scale=spec.scale,
        causal=spec.causal,
        alibi_slopes=None
        if spec.alibi_slopes is None
        else torch.tensor(spec.alibi_slopes, dtype=torch.float32),
        sliding_window=_window(spec),
        block_table=requests.block_table,
        softcap=spec.softcap or 0.0,
        scheduler_metadata=_schedule(q_TNH, num_kv_heads, requests, spec, isa),
        s_aux=kernel_sinks(sinks_N),
    )
    return out


@dataclass(frozen=True)
class _Requests:
    """Packed samples as the kernel takes them: E requests in a KV cache of their own."""

    borders: torch.Tensor
    """`[E + 1]` int32 borders of the queries."""
    lengths: torch.Tensor
    """`[E]` int32 keys up to the last query of each."""
    block_table: torch.Tensor
    """`[E, M]` int32."""
    slots: torch.Tensor
    """`[T]` int64 place of every token."""
    num_blocks: int


@functools.lru_cache(maxsize=8)
def _requests(sizes: tuple[int, ...], block_size: int, few: int | None) -> _Requests:
    """Of samples of so many tokens, in at most `few` queries each (None: whole).

    Kept, because every layer of a model asks for the same ones.
    """
    block_table, slots, num_blocks = scratch_blocks(sizes, block_size)
    lengths = torch.tensor(sizes, dtype=torch.int32)
    borders = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)
    if few is not None:
        borders, lengths, sample = in_few_queries(borders, lengths, few)
        block_table = block_table[sample]
    return _Requests(borders, lengths, block_table, slots, num_blocks)


def _slopes(spec: AttentionSpec) -> torch.Tensor | None:
    # In float32 also while a model is built, when the default is the model's dtype.
    slopes = spec.alibi_slopes
    return None if slopes is None else torch.tensor(slopes, dtype=torch.float32)


def _window(spec: AttentionSpec) -> int:
    return -1 if spec.sliding_window is None else spec.sliding_window


def _schedule(
    q_TNH: torch.Tensor,
    num_kv_heads: int,
    requests: _Requests,
    spec: AttentionSpec,
    isa: str,
) -> torch.Tensor:
    """The kernel's own plan of which thread attends to what."""
    from vllm import _custom_ops as ops

    plan: torch.Tensor = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(requests.lengths),
        num_heads=q_TNH.shape[1],
        num_kv_heads=num_kv_heads,
        head_dim=q_TNH.shape[2],
        seq_lens=requests.lengths,
        dtype=q_TNH.dtype,
        query_start_loc=requests.borders,
        causal=spec.causal,
        sliding_window_size=_window(spec),
        isa=isa,
        enable_kv_split=False,
    )
    return plan


_ROWS = 8
"""Queries times heads that every variant of the kernel takes at once."""


def few_queries(num_heads: int, num_kv_heads: int) -> int:
    """How many queries of a sample to give the kernel as one request.

    It cuts the keys into tiles that fit the cache beside the queries, so of more queries each
    would add its keys in another order than the one query of a decode step.
    """
    return max(1, _ROWS // (num_heads // num_kv_heads))


def in_few_queries(
    cu_queries: torch.Tensor, seq_lens: torch.Tensor, few: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same queries as requests of at most `few` each.

    Args:
        cu_queries: `[B + 1]` borders of the samples' queries, which are their last tokens.
        seq_lens: `[B]` tokens of each sample, cached ones and queries.
        few: from `few_queries`.

    Returns:
        Borders `[E + 1]` and tokens `[E]` of the requests, int32, and the sample of each `[E]`.
    """
    starts, ends = cu_queries[:-1], cu_queries[1:]
    counts = (ends - starts + few - 1) // few
    sample = torch.arange(len(counts)).repeat_interleave(counts)
    within = torch.arange(len(sample)) - (counts.cumsum(0) - counts)[sample]
    begun = starts[sample] + few * within
    left = (ends[sample] - begun - few).clamp_(min=0)
    borders = torch.cat([begun, cu_queries[-1:]])
    return borders.to(torch.int32), (seq_lens[sample] - left).to(torch.int32), sample


@functools.cache
def exact_backend() -> Any:
    """VLLM's attention backend for CPU, its requests cut by `in_few_queries`.

    Relies on `CPUAttentionMetadataBuilder.build` planning from `CommonAttentionMetadata`, up to
    0.32. Can go when the kernel's tiles of keys do not depend on the number of queries.
    """
    from vllm.v1.attention.backends.cpu_attn import (
        CPUAttentionBackend,
        CPUAttentionMetadataBuilder,
    )

    class Builder(CPUAttentionMetadataBuilder):  # type: ignore[misc]
        def build(
            self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
        ) -> Any:
            few = few_queries(self.num_heads, self.num_kv_heads)
            common = common_attn_metadata
            if common.causal is True and common.max_query_len > few:
                common = _cut(common, few)
            return super().build(common_prefix_len, common, fast_build)

    class ExactCpuBackend(CPUAttentionBackend):  # type: ignore[misc]
        @staticmethod
        def get_builder_cls() -> Any:
            return Builder

    return ExactCpuBackend


def _cut(common: Any, few: int) -> Any:
    requests = common.num_reqs
    borders, lengths, sample = in_few_queries(
        common.query_start_loc[: requests + 1], common.seq_lens[:requests], few
    )
    return replace(
        common,
        query_start_loc=borders,
        query_start_loc_cpu=borders,
        seq_lens=lengths,
        num_reqs=len(lengths),
        max_query_len=few,
        block_table_tensor=common.block_table_tensor[sample],
    )


@functools.cache
def _ask_for_amx() -> None:
    """Linux gives a process AMX tiles on request only; without it the kernel dies by SIGILL.

    An engine's first oneDNN product asks for them. A training forward may come before any.
    """
    if not torch.cpu._init_amx():
        raise RuntimeError(
            "vLLM's CPU attention kernel takes AMX tiles for bf16 on this processor, and the "
            "system refused them to this process; run on a Linux kernel of 5.16 or later"
        )


def kernel_sinks(sinks_N: torch.Tensor | None) -> torch.Tensor | None:
    """Sinks in a dtype that the kernel takes."""
    known = (torch.bfloat16, torch.float32)
    return sinks_N if sinks_N is None or sinks_N.dtype in known else sinks_N.float()


@functools.cache
def supports_latent(*, kv_lora_rank: int, qk_rope_head_dim: int, dtype: torch.dtype) -> bool:
    """Whether the latent kernel takes these sizes; smaller ones are padded to its own."""
    from vllm.platforms import current_platform

    fits = kv_lora_rank <= LATENT_RANK and qk_rope_head_dim <= LATENT_ROPE
    known = dtype in (torch.float32, torch.bfloat16, torch.float16)
    return fits and known and bool(current_platform.is_cpu())


def latent_attention(
    q_TNC: torch.Tensor,
    cache: torch.Tensor,
    batch: LatentBatch,
    scale: float,
    qk_rope_head_dim: int,
) -> torch.Tensor:
    """Attention in the latent space: one arithmetic for prefill, decode and training.

    Every token is an entry of its own that sees as many keys as stand before it, so a
    token's result does not depend on how its sequence came into the cache. By Graft's kernel
    where there is one, else by the one that vLLM calls for decode.

    Args:
        q_TNC: `[T, N, R + P]` absorbed queries.
        cache: `[blocks, 16, R + P]`, the tokens' own latent vectors already in it.
        batch: blocks and lengths of the tokens.
        scale: of the scores before softmax.
        qk_rope_head_dim: P.

    Returns:
        `[T, N, R]` weighted latent vectors in `q_TNC`'s dtype.
    """
    rank, table = q_TNC.shape[-1] - qk_rope_head_dim, batch.block_table
    if latent_bf16.takes(q_TNC, rank):
        return latent_bf16.attend(q_TNC, cache, table, batch.sequence, batch.lengths, rank, scale)
    from vllm import _custom_ops as ops

    if (rank, qk_rope_head_dim) != (LATENT_RANK, LATENT_ROPE):
        cache, table = pad_latent(cache[table.flatten().long()], rank), _own_blocks(table)
        q_TNC = pad_latent(q_TNC, rank)
    out = q_TNC.new_zeros(*q_TNC.shape[:2], LATENT_RANK)
    ops.mla_decode_kvcache_cpu(
        out, q_TNC.contiguous(), cache, scale, table[batch.sequence], batch.lengths
    )
    return out[..., :rank]


def _own_blocks(table: torch.Tensor) -> torch.Tensor:
    """The block table of blocks gathered in the order of `table`."""
    return torch.arange(table.numel(), dtype=torch.int32).view(table.shape)


def latent_over_scratch(
    kv_c_TR: torch.Tensor, k_pe_TP: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> Callable[[torch.Tensor], torch.Tensor]:
    """`latent_attention` of absorbed queries `[T, N, R + P]` to these tokens, packed samples."""
    cache, batch = latent_scratch(kv_c_TR, k_pe_TP, cu_seqlens)
    return lambda query: latent_attention(query, cache, batch, scale, k_pe_TP.shape[-1])


def latent_scratch(
    kv_c_TR: torch.Tensor, k_pe_TP: torch.Tensor, cu_seqlens: torch.Tensor
) -> tuple[torch.Tensor, LatentBatch]:
    """A latent cache filled with packed samples: `[blocks, 16, R + P]`, and where they are."""
    lengths = tuple((cu_seqlens[1:] - cu_seqlens[:-1]).tolist())
    table, slots, num_blocks = scratch_blocks(lengths, LATENT_BLOCK_SIZE)
    rows = torch.cat([kv_c_TR, k_pe_TP], dim=-1)
    cache = rows.new_zeros(num_blocks * LATENT_BLOCK_SIZE, rows.shape[-1])
    cache[slots] = rows
    return cache.view(num_blocks, LATENT_BLOCK_SIZE, -1), LatentBatch.of(cu_seqlens, table)


def rms_norm_kernel() -> Callable[[torch.Tensor, torch.Tensor | None, float], torch.Tensor] | None:
    """VLLM's RMS norm as `norms.Kernel`, None where this build has none for CPU.

    Relies on `_C.rms_norm(out, input, weight, epsilon)`, up to 0.32.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return None
    from vllm import _custom_ops  # noqa: F401 - loads the library of operations

    def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        out = torch.empty_like(x)
        torch.ops._C.rms_norm(out, x, weight, eps)
        return out

    return rms_norm
