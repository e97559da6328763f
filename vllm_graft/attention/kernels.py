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
    softcap: float | None = None
    """Scores become `softcap * tanh(score / softcap)` before the mask; None for no cap."""
    alibi_slopes: tuple[float, ...] | None = None
    """One per query head: `slope * (key position - query position)` is added to the scores."""

    @property
    def plain(self) -> bool:
        """Whether the scores go into the softmax as they are."""
        return self.softcap is None and self.alibi_slopes is None


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
    sinks_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """Differentiable attention, one sample at a time. Returns `[T, N, H]`."""
    # Slices would each have a gradient as long as the whole batch.
    lengths = cu_seqlens.diff().tolist()
    parts = (x.transpose(0, 1).split(lengths, 1) for x in (q_TNH, k_TKH, v_TKH))
    outputs = []
    for q, k, v in zip(*parts, strict=True):
        one = _sdpa if spec.plain and sinks_N is None else _written_out
        outputs.append(one(q, k, v, spec, dropout, sinks_N).transpose(0, 1))
    return torch.cat(outputs)


def _sdpa(
    q_NLH: torch.Tensor,
    k_KLH: torch.Tensor,
    v_KLH: torch.Tensor,
    spec: AttentionSpec,
    dropout: float,
    _: torch.Tensor | None,
) -> torch.Tensor:
    mask = sample_mask(q_NLH.shape[1], spec, q_NLH.device)
    out = F.scaled_dot_product_attention(
        q_NLH[None],
        k_KLH[None],
        v_KLH[None],
        attn_mask=mask,
        is_causal=spec.causal and mask is None,
        dropout_p=dropout,
        scale=spec.scale,
        enable_gqa=q_NLH.shape[0] != k_KLH.shape[0],
    )
    return out[0]


def _written_out(
    q_NLH: torch.Tensor,
    k_KLH: torch.Tensor,
    v_KLH: torch.Tensor,
    spec: AttentionSpec,
    dropout: float,
    sinks_N: torch.Tensor | None,
) -> torch.Tensor:
    """What PyTorch's kernel lacks: softcap, ALiBi, sinks. Scores are float32 or wider."""
    length, repeats = q_NLH.shape[1], q_NLH.shape[0] // k_KLH.shape[0]
    wide = torch.promote_types(q_NLH.dtype, torch.float32)
    k, v = (x.repeat_interleave(repeats, 0).to(wide) for x in (k_KLH, v_KLH))
    scores = q_NLH.to(wide) @ k.transpose(1, 2) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    at = torch.arange(length, device=q_NLH.device)
    if spec.alibi_slopes is not None:
        slopes = torch.tensor(spec.alibi_slopes, device=q_NLH.device)
        scores = scores + slopes[:, None, None] * (at - at[:, None])
    mask = sample_mask(length, spec, q_NLH.device)
    if mask is None and spec.causal:
        mask = at <= at[:, None]
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks_N is not None:
        # A key that takes weight and gives nothing.
        scores = torch.cat([scores, sinks_N.to(wide)[:, None, None].expand(-1, length, 1)], -1)
    weights = F.dropout(scores.softmax(-1)[..., :length], dropout)
    return (weights @ v).to(q_NLH.dtype)


class _EngineAttention(torch.autograd.Function):
    """Engine kernel forward; backward by recomputation through `sdpa_packed`."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        cu_seqlens: torch.Tensor,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        from vllm_graft.serve import _vllm_cpu

        ctx.save_for_backward(q, k, v, *(() if sinks is None else (sinks,)))
        ctx.cu_seqlens, ctx.spec = cu_seqlens, spec
        return _vllm_cpu.paged_attention(q, k, v, cu_seqlens, spec, sinks)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        q, k, v, sinks = (*leaves, None)[:4]
        with torch.enable_grad():
            out = sdpa_packed(q, k, v, ctx.cu_seqlens, ctx.spec, sinks_N=sinks)
        grads = torch.autograd.grad(out, leaves, grad_out)
        return (*grads, None, None, None)[:6]


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
    sinks_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of packed samples that never see each other.

    Args:
        q_TNH: `[T, N, H]`; k_TKH, v_TKH: `[T, K, H]`, N a multiple of K.
        cu_seqlens: `[B + 1]` int32 on CPU, from `positions.check_cu_seqlens`.
        spec: scale, causality, window, softcap, ALiBi.
        dropout: probability on the attention weights. Above 0 the engine's
            kernel, which has none, is not used.
        sinks_N: `[N]` scores of a key without value, in every softmax; None for no such key.

    Returns:
        `[T, N, H]` in `q_TNH`'s dtype, differentiable in q, k, v and the sinks.
    """
    if q_TNH.shape[0] == 0:
        return q_TNH.new_zeros(0, q_TNH.shape[1], v_TKH.shape[2])
    if q_TNH.is_cuda and dropout == 0.0 and spec.plain and sinks_N is None:
        from vllm_graft.attention.cuda import cuda_attention

        return cuda_attention(q_TNH, k_TKH, v_TKH, cu_seqlens, spec)
    if dropout > 0.0 or not _engine_kernel_fits(q_TNH):
        return sdpa_packed(q_TNH, k_TKH, v_TKH, cu_seqlens, spec, dropout, sinks_N)
    out: torch.Tensor = _EngineAttention.apply(  # type: ignore[no-untyped-call]
        q_TNH, k_TKH, v_TKH, sinks_N, cu_seqlens, spec
    )
    return out
