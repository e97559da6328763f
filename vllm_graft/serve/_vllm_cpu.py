"""vLLM's CPU attention kernels, for the training forward (internals of vLLM, as `_vllm.py`).

Legend: T packed tokens, B samples, N query heads, K key/value heads, H head dim,
R latent rank, P rope dims.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from vllm_graft.attention.kernels import AttentionSpec
from vllm_graft.exact import compiled_serving, define_op
from vllm_graft.serve.scratch import LatentBatch, scratch_blocks
from vllm_graft.tiles import Product, Rows, fill_by_rows, linear_rows, same_order

_BLOCK_SIZE = 128  # vLLM's default block size on CPU; the result does not depend on it.
LATENT_BLOCK_SIZE = 16
LATENT_RANK, LATENT_ROPE = 512, 64
"""What `mla_decode_kvcache` is compiled for (vLLM 0.32, `csrc/cpu/mla_decode.cpp`)."""


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
    window = -1 if spec.sliding_window is None else spec.sliding_window
    isa = _get_attn_isa(q_TNH.dtype, _BLOCK_SIZE, head_size)
    if isa == "amx":
        _ask_for_amx()
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    block_table, slots, num_blocks = scratch_blocks(tuple(lengths.tolist()), _BLOCK_SIZE)
    if spec.causal:
        few = few_queries(num_heads, num_kv_heads)
        cu_seqlens, lengths, sample = in_few_queries(cu_seqlens, lengths, few)
        block_table = block_table[sample]
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
        causal=spec.causal,
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
        scale=spec.scale,
        causal=spec.causal,
        alibi_slopes=None if spec.alibi_slopes is None else torch.tensor(spec.alibi_slopes),
        sliding_window=window,
        block_table=block_table,
        softcap=spec.softcap or 0.0,
        scheduler_metadata=schedule,
        s_aux=kernel_sinks(sinks_N),
    )
    return out


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

    vLLM calls this kernel for decode, one query per sequence. Here every token
    is an entry of its own that sees as many keys as stand before it, so a
    token's result does not depend on how its sequence came into the cache.

    Args:
        q_TNC: `[T, N, R + P]` absorbed queries.
        cache: `[blocks, 16, R + P]`, the tokens' own latent vectors already in it.
        batch: blocks and lengths of the tokens.
        scale: of the scores before softmax.
        qk_rope_head_dim: P.

    Returns:
        `[T, N, R]` weighted latent vectors in `q_TNC`'s dtype.
    """
    from vllm import _custom_ops as ops

    rank = q_TNC.shape[-1] - qk_rope_head_dim
    table = batch.block_table
    if (rank, qk_rope_head_dim) != (LATENT_RANK, LATENT_ROPE):
        cache, table = _padded(cache[table.flatten().long()], rank), _own_blocks(table)
        q_TNC = _padded(q_TNC, rank)
    out = q_TNC.new_zeros(*q_TNC.shape[:2], LATENT_RANK)
    ops.mla_decode_kvcache_cpu(
        out, q_TNC.contiguous(), cache, scale, table[batch.sequence], batch.lengths
    )
    return out[..., :rank]


def _padded(x: torch.Tensor, rank: int) -> torch.Tensor:
    """Latent and rope dims at the kernel's own places, zeros (which change nothing) between."""
    latent, rope = x.split([rank, x.shape[-1] - rank], dim=-1)
    return torch.cat(
        [F.pad(latent, (0, LATENT_RANK - rank)), F.pad(rope, (0, LATENT_ROPE - rope.shape[-1]))], -1
    )


def _own_blocks(table: torch.Tensor) -> torch.Tensor:
    """The block table of blocks gathered in the order of `table`."""
    return torch.arange(table.numel(), dtype=torch.int32).view(table.shape)


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


@functools.cache
def packs(dtype: torch.dtype) -> bool:
    """Whether this processor has packed products in `dtype`: bf16 ones need AVX-512."""
    from vllm import _custom_ops as ops

    if not ops._supports_onednn:
        return False
    try:
        ops.create_onednn_mm(torch.zeros(32, 32, dtype=dtype).t(), 32)
    except RuntimeError:  # oneDNN has no such primitive; vLLM's own layers go without it too
        return False
    return True


class CpuPacker:
    """vLLM's packed oneDNN products, by which its own linear layers serve on CPU.

    Relies on `create_onednn_mm` and `onednn_mm` of `vllm._custom_ops`, up to 0.32.

    Args:
        exact: take only weights whose products have the bits of `exact.linear`, and give a row
            the same bits among any others.
    """

    def __init__(self, *, exact: bool) -> None:
        self._exact = exact
        self._dtypes = tuple(filter(packs, (torch.bfloat16, torch.float32)))

    def takes(self, weight: torch.Tensor) -> bool:
        """Whether `weight` is a matrix that may be packed."""
        plain = isinstance(weight, torch.nn.Parameter) and type(weight.data) is torch.Tensor
        fits = plain and weight.dim() == 2 and weight.dtype in self._dtypes
        if not (fits and weight.device.type == "cpu"):
            return False
        return self.joins([weight])

    def joins(self, weights: Sequence[torch.Tensor]) -> bool:
        """Whether one product by `weights` has the bits of a product by each."""
        rows = tuple(weight.shape[0] for weight in weights)
        return not self._exact or _adds_as_linear(rows, weights[0].shape[1], weights[0].dtype)

    def pack(self, weight: torch.Tensor) -> OneDnnKernel:
        """A packed copy of `[M, K]`."""
        return _packed(weight)

    def multiply(
        self, x: torch.Tensor, bias: torch.Tensor | None, handle: torch.Tensor, rows: int
    ) -> torch.Tensor:
        """`[..., K]` to `[..., rows]`; see `products.Packer`."""
        flat = x.reshape(-1, x.shape[-1])
        if self._exact:
            out = _multiply_exactly(flat, bias, handle, rows)
        else:
            out = _multiply(flat, bias, handle, rows)
        return out.view(*x.shape[:-1], rows)


def _packed(weight: torch.Tensor) -> OneDnnKernel:
    from vllm import _custom_ops as ops

    return OneDnnKernel(ops.create_onednn_mm(weight.t(), 32))


def _multiply(
    x: torch.Tensor, bias: torch.Tensor | None, handle: torch.Tensor, outputs: int
) -> torch.Tensor:
    out = x.new_empty(x.shape[0], outputs)
    torch.ops._C.onednn_mm(out, x.contiguous(), bias, handle)
    return out


def _multiply_exactly(
    x: torch.Tensor, bias: torch.Tensor | None, handle: torch.Tensor, outputs: int
) -> torch.Tensor:
    """`_multiply` by numbers of rows that give each the same bits."""
    if not compiled_serving():
        return _multiply_by_rows(x, bias, handle, outputs)
    step = _packed_step(outputs, x.shape[1], x.dtype)
    if step is None:
        out: torch.Tensor = torch.ops.vllm_graft.packed_linear(x, bias, handle, outputs)
        return out
    # One graph serves all numbers of rows and believes that they are two at least: a lone row
    # follows from the remainder.
    rows = x.shape[0]
    return _multiply(F.pad(x, (0, 0, 0, -rows % step)), bias, handle, outputs)[:rows]


def _multiply_by_rows(
    x: torch.Tensor, bias: torch.Tensor | None, handle: torch.Tensor, outputs: int
) -> torch.Tensor:
    def fill(part: torch.Tensor, room: torch.Tensor) -> None:
        torch.ops._C.onednn_mm(room, part, bias, handle)

    out = x.new_empty(x.shape[0], outputs)
    fill_by_rows(fill, x.contiguous(), out, _packed_rows(outputs, x.shape[1], x.dtype))
    return out


define_op(
    "packed_linear(Tensor x, Tensor? bias, Tensor handle, int outputs) -> Tensor",
    _multiply_by_rows,
    lambda x, bias, handle, outputs: x.new_empty(x.shape[0], outputs),
)


def _by_packed_weight(weight: torch.Tensor) -> Product:
    kernel = _packed(weight)
    return lambda x: _multiply(x, None, kernel.handle, weight.shape[0])


def _packed_rows(outputs: int, inputs: int, dtype: torch.dtype) -> Rows:
    return linear_rows(_by_packed_weight, outputs, inputs, dtype, torch.get_num_threads())


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _packed_step(outputs: int, inputs: int, dtype: torch.dtype) -> int | None:
    return _packed_rows(outputs, inputs, dtype).step


@functools.cache
def _adds_as_linear(rows: tuple[int, ...], inputs: int, dtype: torch.dtype) -> bool:
    """Whether a packed product has the bits of a `F.linear` by each part of the weight.

    In float32 it often has not.
    """

    def apart(weight: torch.Tensor) -> Product:
        return lambda x: torch.cat([F.linear(x, part) for part in weight.split(rows)], -1)

    return same_order(_by_packed_weight, apart, sum(rows), inputs, dtype)


@dataclass(frozen=True)
class OneDnnKernel:
    """Keeps vLLM's handler alive, which frees the packed weight when it goes."""

    handler: Any

    @property
    def handle(self) -> torch.Tensor:
        """The address of the handler, `[1]` int64."""
        address: torch.Tensor = self.handler.handler_tensor.view(1)
        return address
