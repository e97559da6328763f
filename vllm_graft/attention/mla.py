"""Multi-head latent attention (DeepSeek V2/V3): trainable block and cache spec.

This release trains `TrainableMLA`; the adapter refuses to serve it.

Legend: T tokens, B sequences, L length, D width, N heads, R latent rank
(`kv_lora_rank`), P rope dims (`qk_rope_head_dim`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vllm_graft.attention.flash import token_positions
from vllm_graft.attention.kernels import AttentionSpec, sample_borders, sdpa_packed
from vllm_graft.rope import apply_rope, whole_table


@dataclass
class MLAConfig:
    """Sizes of an MLA block, in the words of Hugging Face's DeepSeek configs."""

    hidden_size: int
    num_heads: int
    q_lora_rank: int = 0
    """Rank of the compressed query; 0 projects queries directly."""
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    norm_eps: float = 1e-5
    dropout: float = 0.0
    scale: float | None = None
    """Softmax scale; `qk_head_dim ** -0.5` by default (pass YaRN's corrected one)."""
    causal: bool = True

    @property
    def qk_head_dim(self) -> int:
        """Query/key head dim: the part without RoPE plus the part with it."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


class TrainableMLA(nn.Module):
    """Latent attention with low-rank Q and KV and one rotated key shared by all heads.

    Parameters: `wq`, or `wq_a`, `q_norm`, `wq_b` with a query rank; `wkv_a`
    (R + P rows), `kv_norm`, `wkv_b`, `wo`. RoPE pairs adjacent dimensions, as
    TorchTitan's complex tables do (DeepSeek-V3 paper, section 2.1.1).
    """

    def __init__(self, config: MLAConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        q_size = c.num_heads * c.qk_head_dim
        if c.q_lora_rank == 0:
            self.wq = nn.Linear(c.hidden_size, q_size, bias=False)
        else:
            self.wq_a = nn.Linear(c.hidden_size, c.q_lora_rank, bias=False)
            self.q_norm = nn.RMSNorm(c.q_lora_rank, eps=c.norm_eps)
            self.wq_b = nn.Linear(c.q_lora_rank, q_size, bias=False)
        self.wkv_a = nn.Linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim, bias=False)
        self.kv_norm = nn.RMSNorm(c.kv_lora_rank, eps=c.norm_eps)
        kv_size = c.num_heads * (c.qk_nope_head_dim + c.v_head_dim)
        self.wkv_b = nn.Linear(c.kv_lora_rank, kv_size, bias=False)
        self.wo = nn.Linear(c.num_heads * c.v_head_dim, c.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        freqs_cis: torch.Tensor,
        attention_mask: None = None,
        positions: torch.Tensor | None = None,
        *,
        cu_seqlens: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attend to `[T, D]` or `[B, L, D]`; arguments as in `TrainableFlashAttention`.

        Raises:
            ValueError: a dense mask, or borders that do not fit.
            IndexError: a position outside the RoPE table.
        """
        if attention_mask is not None:
            raise ValueError("TrainableMLA takes no dense attention_mask; pass cu_seqlens")
        c, lead = self.config, hidden_states.shape[:-1]
        borders = sample_borders(self, lead, cu_seqlens)
        at = token_positions(hidden_states, positions, cu_seqlens)
        table = whole_table(freqs_cis)
        q_nope, q_pe = self._queries(hidden_states.flatten(0, -2)).split(
            [c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1
        )
        latent, k_pe = self.wkv_a(hidden_states.flatten(0, -2)).split(
            [c.kv_lora_rank, c.qk_rope_head_dim], dim=-1
        )
        expanded = self.wkv_b(self.kv_norm(latent)).unflatten(-1, (c.num_heads, -1))
        k_nope, v = expanded.split([c.qk_nope_head_dim, c.v_head_dim], dim=-1)
        q_pe, k_pe = (apply_rope(x, table, at) for x in (q_pe, k_pe.unsqueeze(1)))
        q = torch.cat([q_nope, q_pe], dim=-1)
        k = torch.cat([k_nope, k_pe.expand(-1, c.num_heads, -1)], dim=-1)
        scale = c.qk_head_dim**-0.5 if c.scale is None else c.scale
        spec = AttentionSpec(scale=scale, causal=c.causal)
        out = sdpa_packed(q, k, v, borders, spec, c.dropout if self.training else 0.0)
        projected: torch.Tensor = self.wo(out.flatten(1).view(*lead, -1))
        return projected

    def _queries(self, x_TD: torch.Tensor) -> torch.Tensor:
        c = self.config
        q = self.wq(x_TD) if c.q_lora_rank == 0 else self.wq_b(self.q_norm(self.wq_a(x_TD)))
        heads: torch.Tensor = q.unflatten(-1, (c.num_heads, c.qk_head_dim))
        return heads


def create_mla_kv_cache_spec(
    kv_lora_rank: int, qk_rope_head_dim: int, block_size: int, dtype: torch.dtype
) -> Any:
    """Make vLLM's KV-cache spec for one MLA layer.

    Per token the cache holds one vector of `kv_lora_rank + qk_rope_head_dim`
    numbers, shared by all heads.

    Args:
        kv_lora_rank: R, width of the compressed keys and values.
        qk_rope_head_dim: P, width of the rotated key.
        block_size: tokens per cache block.
        dtype: of the cached numbers.

    Returns:
        A `vllm.v1.kv_cache_interface.MLAAttentionSpec` with one KV head.
    """
    from vllm_graft.serve._vllm import mla_kv_cache_spec

    return mla_kv_cache_spec(
        head_size=kv_lora_rank + qk_rope_head_dim, block_size=block_size, dtype=dtype
    )
