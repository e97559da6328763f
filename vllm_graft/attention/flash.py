"""`TrainableFlashAttention`: a whole attention block around `CoreAttention`.

Legend: T tokens, B sequences, L length, D width, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vllm_graft.attention.core import CoreAttention
from vllm_graft.positions import current_batch, positions_of
from vllm_graft.rope import apply_rope, remembered_table


def token_positions(
    x: torch.Tensor, positions: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> torch.Tensor:
    """Positions `[T]` of the tokens in `x` (`[T, D]` or `[B, L, D]`).

    Those given, else counted within `cu_seqlens`, else those of the running
    batch (vLLM's or `packed`'s), else counted from 0 in every row.
    """
    batch, lead = current_batch(), x.shape[:-1]
    if positions is not None:
        return positions.expand(lead).flatten()
    if cu_seqlens is not None:
        return positions_of(cu_seqlens).to(x.device)
    if batch is not None:
        return batch.positions.to(x.device)
    return torch.arange(lead[-1], device=x.device).expand(lead).flatten()


class TrainableFlashAttention(nn.Module):
    """Projections, optional QK norm, RoPE, attention and output projection.

    For hand-written models, and for blocks that have no seam of their own
    (`replace_with_trainable_attention` then adopts their old projections).

    Args:
        hidden_size: model width D.
        num_heads: query heads N.
        num_kv_heads: key/value heads K, N by default.
        head_dim: H, `hidden_size // num_heads` by default.
        dropout: probability on attention weights, in training mode only.
        scale: softmax scale, `head_dim ** -0.5` by default.
        causal: whether queries see only keys at or before them.
        use_fused_qkv: parameters `qkv`, `o_proj` when True (rows Q, then K, then V);
            `wq`, `wk`, `wv`, `wo` when False.
        use_qk_norm: RMS norms `q_norm`, `k_norm` over each head before RoPE.
        norm_eps: epsilon of those norms.
        sliding_window: keys a query sees, itself included; None for all.
        rope_interleaved: pairing of real `[S, H]` tables, see `rope.apply_rope`.

    Raises:
        ValueError: head counts that do not divide.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        dropout: float = 0.0,
        scale: float | None = None,
        causal: bool = True,
        use_fused_qkv: bool = True,
        use_qk_norm: bool = False,
        norm_eps: float = 1e-6,
        *,
        sliding_window: int | None = None,
        rope_interleaved: bool = True,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(f"hidden_size={hidden_size} is not a multiple of {num_heads=}")
        head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.use_fused_qkv, self.rope_interleaved = use_fused_qkv, rope_interleaved
        q_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
        if use_fused_qkv:
            self.qkv = nn.Linear(hidden_size, q_size + 2 * kv_size, bias=False)
            self.o_proj = nn.Linear(q_size, hidden_size, bias=False)
        else:
            self.wq = nn.Linear(hidden_size, q_size, bias=False)
            self.wk = nn.Linear(hidden_size, kv_size, bias=False)
            self.wv = nn.Linear(hidden_size, kv_size, bias=False)
            self.wo = nn.Linear(q_size, hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(head_dim, eps=norm_eps) if use_qk_norm else None
        self.k_norm = nn.RMSNorm(head_dim, eps=norm_eps) if use_qk_norm else None
        self.core = CoreAttention(
            num_heads,
            num_kv_heads,
            head_dim,
            scale=scale,
            sliding_window=sliding_window,
            dropout=dropout,
            causal=causal,
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        freqs_cis: torch.Tensor | None = None,
        attention_mask: None = None,
        *,
        positions: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attend.

        Args:
            hidden_states: `[T, D]` or `[B, L, D]`.
            freqs_cis: RoPE table (layouts: `rope.apply_rope`), or None for no RoPE.
                A prefix slice of the model's table is enough.
            attention_mask: refused unless None; `causal`, `sliding_window` and
                `cu_seqlens` say what is masked.
            positions: one per token. By default vLLM's inside the engine, those
                of `packed(...)`, else counted from 0 in every sample.
            cu_seqlens: `[S + 1]` borders of samples packed into the tokens.
            kwargs: ignored; external blocks pass arguments of their own attention.

        Returns:
            The shape of `hidden_states`.

        Raises:
            ValueError: a dense mask, a wrong width, or bad borders.
            IndexError: a position outside the RoPE table.
        """
        if attention_mask is not None:
            raise ValueError(
                "TrainableFlashAttention takes no dense attention_mask: pass cu_seqlens for "
                "packed samples, or build it with causal=... and sliding_window=..."
            )
        q, k, v = self._project(hidden_states)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if freqs_cis is not None:
            at = token_positions(hidden_states, positions, cu_seqlens)
            q, k = (self._rope(x, freqs_cis, at) for x in (q, k))
        out = self.core(q, k, v, cu_seqlens=cu_seqlens).flatten(-2)
        projected: torch.Tensor = self.o_proj(out) if self.use_fused_qkv else self.wo(out)
        return projected

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        heads = (self.core.num_heads, self.core.num_kv_heads, self.core.num_kv_heads)
        if self.use_fused_qkv:
            parts = self.qkv(x).split([n * self.core.head_dim for n in heads], dim=-1)
        else:
            parts = (self.wq(x), self.wk(x), self.wv(x))
        return tuple(
            part.unflatten(-1, (n, self.core.head_dim))
            for part, n in zip(parts, heads, strict=True)
        )

    def _rope(self, x: torch.Tensor, table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, 1) if x.dim() == 4 else x
        table = remembered_table(self, table)
        rotated = apply_rope(flat, table, positions, interleaved=self.rope_interleaved)
        return rotated.view(x.shape)
