"""Flash attention on CUDA: the training forward runs the serving kernel.

Where vLLM is installed that is vLLM's flash-attention op over a scratch paged
cache, and the backward is PyTorch's flash kernel. Elsewhere both are PyTorch's
`varlen_attn`. Either way the keys of one query are never split over thread blocks:
how many blocks a kernel would choose depends on the batch, and another number
adds up in another order (`num_splits` in torch's `varlen_attn`).

Importing this module touches no CUDA state.

Legend: T packed tokens, B samples, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F

from vllm_graft.attention.kernels import AttentionSpec, sdpa_packed

MAX_HEAD_DIM = 256
"""Largest head dim of FlashAttention 2; it must also be a multiple of 8."""

MIN_MAX_Q = 2
"""Query length promised to the kernel even when every sample has one token.

At 1, FlashAttention 2 folds grouped query heads into the query axis and picks
a number of key splits from the batch; from 2 on it runs the prefill kernel.
"""


def flash_supports(q_TNH: torch.Tensor, v_TKH: torch.Tensor) -> bool:
    """Whether the flash kernel takes these tensors (device, dtype, head dims)."""
    head_dim = q_TNH.shape[-1]
    return (
        q_TNH.is_cuda
        and q_TNH.dtype in (torch.float16, torch.bfloat16)
        and head_dim % 8 == 0
        and v_TKH.shape[-1] <= head_dim <= MAX_HEAD_DIM
        and torch.cuda.get_device_capability(q_TNH.device) >= (8, 0)
    )


def cuda_attention(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    cu_seqlens: torch.Tensor,
    spec: AttentionSpec,
) -> torch.Tensor:
    """Attention of packed samples, by flash attention where it fits.

    Args:
        q_TNH: `[T, N, H]`; k_TKH: `[T, K, H]`, N a multiple of K; v_TKH:
            `[T, K, Hv]` with `Hv <= H` (MLA's values are narrower than its keys).
        cu_seqlens: `[B + 1]` int32 borders on CPU, so that no kernel waits for them.
        spec: scale, causality, window.

    Returns:
        `[T, N, Hv]` in `q_TNH`'s dtype, differentiable in q, k and v. float32 and
        head dims that flash attention lacks go through `sdpa_packed`.
    """
    if not flash_supports(q_TNH, v_TKH):
        return sdpa_packed(q_TNH, k_TKH, v_TKH, cu_seqlens, spec)
    if k_TKH.shape[-1] == v_TKH.shape[-1] and _engine_op_fits(q_TNH):
        out: torch.Tensor = _EngineFlash.apply(  # type: ignore[no-untyped-call]
            q_TNH, k_TKH, v_TKH, cu_seqlens, spec
        )
        return out
    return varlen_packed(q_TNH, k_TKH, v_TKH, cu_seqlens, spec)


def varlen_packed(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    cu_seqlens: torch.Tensor,
    spec: AttentionSpec,
) -> torch.Tensor:
    """`cuda_attention` by PyTorch's kernel alone; arguments and result are the same."""
    longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
    on_device = cu_seqlens.to(q_TNH.device, non_blocking=True)
    return varlen(q_TNH, k_TKH, v_TKH, on_device, on_device, longest, longest, spec)


def varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    spec: AttentionSpec,
    **paged: Any,
) -> torch.Tensor:
    """One call of torch's `varlen_attn` with a fixed split.

    Args:
        q: `[Tq, N, H]`; k: `[Tk, K, H]`; v: `[Tk, K, Hv]`; with `block_table`,
            k and v are pools of pages, `[pages, page size, K, H]`.
        cu_q, cu_k: `[B + 1]` int32 borders on the tensors' device. The last
            query of a sample stands at its last key.
        max_q, max_k: longest sample, in queries and in keys.
        spec: scale, causality, window.
        paged: `block_table` and `seqused_k`, where this PyTorch has them.

    Returns:
        `[Tq, N, Hv]`.
    """
    from torch.nn.attention.varlen import varlen_attn

    width = v.shape[-1]
    # FlashAttention 2 has one head dim. Columns of zeros change no other column.
    v = F.pad(v, (0, q.shape[-1] - width)) if width < q.shape[-1] else v
    options: dict[str, Any] = {
        "scale": spec.scale,
        "window_size": window_of(spec),
        "enable_gqa": q.shape[1] != k.shape[-2],
        "num_splits": 1,
    }
    known = {name: value for name, value in options.items() if name in varlen_parameters()}
    out = varlen_attn(q, k, v, cu_q, cu_k, max(max_q, MIN_MAX_Q), max_k, **known, **paged)
    assert isinstance(out, torch.Tensor)  # noqa: S101 - no auxiliary output was asked for
    return out[..., :width]


@lru_cache
def varlen_parameters() -> frozenset[str]:
    """Names that this PyTorch's `varlen_attn` takes (paging and splits came after 2.11)."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def window_of(spec: AttentionSpec) -> tuple[int, int]:
    """Keys seen to the left and right of a query, itself not counted; -1 for all."""
    left = -1 if spec.sliding_window is None else spec.sliding_window - 1
    return left, 0 if spec.causal else left


class _EngineFlash(torch.autograd.Function):
    """The op of vLLM forward; PyTorch's flash kernel backward, from the same softmax sums."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens: torch.Tensor,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        from vllm_graft.serve._vllm_cuda import paged_flash

        out, lse = paged_flash(q, k, v, cu_seqlens, spec.scale, window_of(spec), causal=spec.causal)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.cu_seqlens, ctx.spec = cu_seqlens, spec
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        borders = ctx.cu_seqlens.to(grad_out.device, non_blocking=True)
        longest = max(int((ctx.cu_seqlens[1:] - ctx.cu_seqlens[:-1]).max()), MIN_MAX_Q)
        left, right = window_of(ctx.spec)
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=grad_out.device)
        grads = torch.ops.aten._flash_attention_backward(
            grad_out.contiguous(),
            *ctx.saved_tensors,
            borders,
            borders,
            longest,
            longest,
            0.0,
            (left, right) == (-1, 0),
            no_dropout,
            torch.empty(0, device=grad_out.device),
            scale=ctx.spec.scale,
            window_size_left=left,
            window_size_right=right,
        )
        return (*grads, None, None)


def _engine_op_fits(q: torch.Tensor) -> bool:
    if find_spec("vllm") is None:
        return False
    from vllm_graft.serve._vllm_cuda import flash_version

    return flash_version(head_dim=q.shape[-1]) is not None
