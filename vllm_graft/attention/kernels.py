"""Attention over packed samples, outside the engine.

`attend` is the training forward. On the CPU build it runs the engine's own
kernel, so log-probabilities equal the served ones bit for bit; its backward
recomputes through scaled dot-product attention, which is also the whole path
where vLLM or a kernel for the shape is absent.

Legend: T packed tokens, N query heads, K key/value heads, H head dim, L sample length.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vllm_graft.positions import batch_for, check_cu_seqlens


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What the kernel needs to know beside q, k and v."""

    scale: float
    causal: bool = True
    sliding_window: int | None = None
    """Keys a query sees, itself included; None for all before it."""


def sample_borders(
    module: nn.Module, lead: torch.Size, cu_seqlens: torch.Tensor | None
) -> torch.Tensor:
    """Borders `[S + 1]` of the samples in tokens of shape `lead` (`[T]` or `[B, L]`).

    Those given, else those of `packed(...)`, else every row of `[B, L]` is one
    sample and `[T]` is one.

    Raises:
        ValueError: borders that do not fit the number of tokens.
        RuntimeError: `module` is recomputed after its packed batch has ended.
    """
    if cu_seqlens is None:
        batch = batch_for(module)
        cu_seqlens = batch.cu_seqlens if batch is not None else None
    if cu_seqlens is not None:
        return check_cu_seqlens(cu_seqlens, lead.numel())
    return torch.arange(0, lead.numel() + 1, max(lead[-1], 1), dtype=torch.int32)


def sample_mask(length: int, spec: AttentionSpec, device: torch.device) -> torch.Tensor | None:
    """Boolean `[L, L]` mask (True = attend), or None where a causal flag says it all."""
    if spec.sliding_window is None or spec.sliding_window >= length:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    mask = distance < spec.sliding_window
    return mask & (distance >= 0) if spec.causal else mask & (distance > -spec.sliding_window)


def sdpa_packed(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    cu_seqlens: torch.Tensor,
    spec: AttentionSpec,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Differentiable attention, one sample at a time. Returns `[T, N, H]`."""
    # Slices would each have a gradient as long as the whole batch.
    lengths = cu_seqlens.diff().tolist()
    parts = (x.transpose(0, 1).split(lengths, 1) for x in (q_TNH, k_TKH, v_TKH))
    outputs = []
    for q, k, v in zip(*parts, strict=True):
        mask = sample_mask(q.shape[1], spec, q.device)
        out = F.scaled_dot_product_attention(
            q[None],
            k[None],
            v[None],
            attn_mask=mask,
            is_causal=spec.causal and mask is None,
            dropout_p=dropout,
            scale=spec.scale,
            enable_gqa=q.shape[0] != k.shape[0],
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


class _EngineAttention(torch.autograd.Function):
    """Engine kernel forward; backward by recomputation through `sdpa_packed`."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens: torch.Tensor,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        from vllm_graft.serve import _vllm_cpu

        ctx.save_for_backward(q, k, v)
        ctx.cu_seqlens, ctx.spec = cu_seqlens, spec
        return _vllm_cpu.paged_attention(
            q, k, v, cu_seqlens, spec.scale, causal=spec.causal, sliding_window=spec.sliding_window
        )

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v = (x.detach().requires_grad_() for x in ctx.saved_tensors)
        with torch.enable_grad():
            out = sdpa_packed(q, k, v, ctx.cu_seqlens, ctx.spec)
        return (*torch.autograd.grad(out, (q, k, v), grad_out), None, None)


def _engine_kernel_fits(q: torch.Tensor) -> bool:
    if q.device.type != "cpu" or find_spec("vllm") is None:
        return False
    from vllm_graft.serve import _vllm_cpu

    return _vllm_cpu.supports(head_size=q.shape[-1], dtype=q.dtype)


def attend(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    cu_seqlens: torch.Tensor,
    spec: AttentionSpec,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention of packed samples that never see each other.

    Args:
        q_TNH: `[T, N, H]`; k_TKH, v_TKH: `[T, K, H]`, N a multiple of K.
        cu_seqlens: `[B + 1]` int32 on CPU, from `positions.check_cu_seqlens`.
        spec: scale, causality, window.
        dropout: probability on the attention weights. Above 0 the engine's
            kernel, which has none, is not used.

    Returns:
        `[T, N, H]` in `q_TNH`'s dtype, differentiable in q, k and v.
    """
    if q_TNH.shape[0] == 0:
        return q_TNH.new_zeros(0, q_TNH.shape[1], v_TKH.shape[2])
    if q_TNH.is_cuda and dropout == 0.0:
        from vllm_graft.attention.cuda import cuda_attention

        return cuda_attention(q_TNH, k_TKH, v_TKH, cu_seqlens, spec)
    if dropout > 0.0 or not _engine_kernel_fits(q_TNH):
        return sdpa_packed(q_TNH, k_TKH, v_TKH, cu_seqlens, spec, dropout)
    out: torch.Tensor = _EngineAttention.apply(  # type: ignore[no-untyped-call]
        q_TNH, k_TKH, v_TKH, cu_seqlens, spec
    )
    return out
