"""Latent attention over packed samples, outside the engine (DeepSeek V2/V3's MLA).

What is cached of a token is one latent vector and one rotated key for all
heads. A query is taken into the latent space (absorbed by half of `wkv_b`),
attends to the latent vectors there, and the other half of `wkv_b` takes the
result to the value dims. Serving and the training forward run the same code;
`wkv_b` is read where it is used, so no copy of it can be stale.

Legend: T packed tokens, N heads, R latent rank (`kv_lora_rank`), C nope dims
(`qk_nope_head_dim`), P rope dims (`qk_rope_head_dim`), V value dims.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from vllm_graft.attention.kernels import AttentionSpec, sdpa_packed
from vllm_graft.exact import heads_product


def split_kv_b(
    kv_b_weight: torch.Tensor, num_heads: int, nope_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of `wkv_b`'s weight `[N * (C + V), R]`: keys `[N, C, R]` and values `[N, V, R]`."""
    per_head = kv_b_weight.unflatten(0, (num_heads, -1))
    return per_head[:, :nope_dim], per_head[:, nope_dim:]


class Heads(Protocol):
    """Multiplies each head by its share of `wkv_b`; a row does not depend on the others."""

    def absorb(self, q_nope_TNC: torch.Tensor) -> torch.Tensor:
        """Queries in the latent space, `[T, N, R]`."""

    def expand(self, latent_TNR: torch.Tensor) -> torch.Tensor:
        """Values of weighted latent vectors, `[T, N, V]`."""


class PlainHeads:
    """`Heads` by the weight itself."""

    def __init__(self, kv_b_weight: torch.Tensor, num_heads: int, nope_dim: int) -> None:
        self._keys, self._values = split_kv_b(kv_b_weight, num_heads, nope_dim)

    def absorb(self, q_nope_TNC: torch.Tensor) -> torch.Tensor:
        """See `Heads`."""
        return heads_product(q_nope_TNC, self._keys)

    def expand(self, latent_TNR: torch.Tensor) -> torch.Tensor:
        """See `Heads`."""
        return heads_product(latent_TNR, self._values.transpose(1, 2))


def absorbed(
    q_TNH: torch.Tensor,
    heads: Heads,
    rope_dim: int,
    attend: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Attention with queries and results in the latent space.

    Args:
        q_TNH: `[T, N, C + P]` queries, the last P dims rotated.
        heads: of `wkv_b`.
        rope_dim: P.
        attend: takes queries `[T, N, R + P]` to weighted latent vectors `[T, N, R]`.

    Returns:
        `[T, N, V]`; a row depends on its own query and context only.
    """
    q_nope, q_pe = q_TNH.split([q_TNH.shape[-1] - rope_dim, rope_dim], dim=-1)
    return heads.expand(attend(torch.cat([heads.absorb(q_nope), q_pe], dim=-1)))


def attend_latent(
    q_TNH: torch.Tensor,
    kv_c_TR: torch.Tensor,
    k_pe_TP: torch.Tensor,
    kv_b_weight: torch.Tensor,
    cu_seqlens: torch.Tensor,
    spec: AttentionSpec,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Latent attention of packed samples that never see each other.

    Args:
        q_TNH: `[T, N, C + P]`, the last P dims rotated.
        kv_c_TR: normed latent vectors `[T, R]`.
        k_pe_TP: the rotated key of each token `[T, P]`, shared by all heads.
        kv_b_weight: `[N * (C + V), R]`.
        cu_seqlens: `[B + 1]` int32 on CPU, from `positions.check_cu_seqlens`.
        spec: scale and causality.
        dropout: probability on the attention weights.

    Returns:
        `[T, N, V]` in `q_TNH`'s dtype, differentiable in the first four. On the CPU build, and
        on cards that `_vllm_cuda.supports_latent`, it is bit-equal to what the engine computes,
        unless dropout is on or attention is not causal.
    """
    num_heads, nope_dim = q_TNH.shape[1], q_TNH.shape[-1] - k_pe_TP.shape[-1]
    if q_TNH.shape[0] == 0:
        return q_TNH.new_zeros(0, num_heads, kv_b_weight.shape[0] // num_heads - nope_dim)
    # Under autocast the queries have the low precision, the norm's output and wkv_b have not.
    kv_c_TR, k_pe_TP, kv_b_weight = (x.to(q_TNH.dtype) for x in (kv_c_TR, k_pe_TP, kv_b_weight))
    if dropout == 0.0 and spec.causal and _engine_kernel_fits(q_TNH, kv_c_TR, k_pe_TP):
        out: torch.Tensor = _EngineLatent.apply(  # type: ignore[no-untyped-call]
            q_TNH, kv_c_TR, k_pe_TP, kv_b_weight, cu_seqlens, spec
        )
        return out
    return attend_expanded(q_TNH, kv_c_TR, k_pe_TP, kv_b_weight, cu_seqlens, spec, dropout)


def attend_expanded(
    q_TNH: torch.Tensor,
    kv_c_TR: torch.Tensor,
    k_pe_TP: torch.Tensor,
    kv_b_weight: torch.Tensor,
    cu_seqlens: torch.Tensor,
    spec: AttentionSpec,
    dropout: float = 0.0,
) -> torch.Tensor:
    """`attend_latent` on keys and values of every head: the form that autograd goes through."""
    num_heads, nope_dim = q_TNH.shape[1], q_TNH.shape[-1] - k_pe_TP.shape[-1]
    expanded = F.linear(kv_c_TR, kv_b_weight).unflatten(-1, (num_heads, -1))
    k_nope, v = expanded.split([nope_dim, expanded.shape[-1] - nope_dim], dim=-1)
    k_TNH = torch.cat([k_nope, k_pe_TP.unsqueeze(1).expand(-1, num_heads, -1)], dim=-1)
    if q_TNH.is_cuda and dropout == 0.0:
        from vllm_graft.attention.cuda import cuda_attention

        return cuda_attention(q_TNH, k_TNH, v, cu_seqlens, spec)
    return sdpa_packed(q_TNH, k_TNH, v, cu_seqlens, spec, dropout)


class _EngineLatent(torch.autograd.Function):
    """Engine kernel forward; backward by recomputation through `attend_expanded`."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        kv_c: torch.Tensor,
        k_pe: torch.Tensor,
        kv_b_weight: torch.Tensor,
        cu_seqlens: torch.Tensor,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        ctx.save_for_backward(q, kv_c, k_pe, kv_b_weight)
        ctx.cu_seqlens, ctx.spec = cu_seqlens, spec
        attend = _kernels(q.device).latent_over_scratch(kv_c, k_pe, cu_seqlens, spec.scale)
        rope_dim = k_pe.shape[-1]
        heads = PlainHeads(kv_b_weight, q.shape[1], q.shape[-1] - rope_dim)
        return absorbed(q, heads, rope_dim, attend)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, kv_c, k_pe, weight = (x.detach().requires_grad_() for x in ctx.saved_tensors)
        with torch.enable_grad():
            out = attend_expanded(q, kv_c, k_pe, weight, ctx.cu_seqlens, ctx.spec)
        return (*torch.autograd.grad(out, (q, kv_c, k_pe, weight), grad_out), None, None)


def _engine_kernel_fits(q: torch.Tensor, kv_c: torch.Tensor, k_pe: torch.Tensor) -> bool:
    if q.device.type not in ("cpu", "cuda") or find_spec("vllm") is None:
        return False
    fits: bool = _kernels(q.device).supports_latent(
        kv_lora_rank=kv_c.shape[-1], qk_rope_head_dim=k_pe.shape[-1], dtype=q.dtype
    )
    return fits


def _kernels(device: torch.device) -> Any:
    """VLLM's latent kernels on this kind of device."""
    from vllm_graft.serve import _vllm_cpu, _vllm_cuda

    return _vllm_cuda if device.type == "cuda" else _vllm_cpu
