"""Multi-head latent attention (DeepSeek V2/V3): trainable block and cache spec.

Legend: T tokens, B sequences, L length, D width, N heads, R latent rank
(`kv_lora_rank`), C nope dims (`qk_nope_head_dim`), P rope dims
(`qk_rope_head_dim`), V value dims (`v_head_dim`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from vllm_graft.attention.flash import token_positions
from vllm_graft.attention.kernels import AttentionSpec, sample_borders
from vllm_graft.attention.latent import attend_latent
from vllm_graft.positions import current_batch
from vllm_graft.products import restore_weights
from vllm_graft.rope import apply_rope, remembered_table

Rotate = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""RoPE on `q_pe` `[T, N, P]` and `k_pe` `[T, 1, P]`."""


class PagedLatentLayer(Protocol):
    """A vLLM MLA layer with its paged latent cache (`serve.kv` makes them)."""

    def active(self) -> bool:
        """Whether vLLM is running a forward at this moment."""

    def __call__(
        self, q_TNH: torch.Tensor, kv_c_TR: torch.Tensor, k_pe_TP: torch.Tensor
    ) -> torch.Tensor:
        """Write the latent vectors to the cache and attend to it; `[T, N, V]`."""


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

    def __post_init__(self) -> None:
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim={self.qk_rope_head_dim} is odd; RoPE rotates pairs")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout} is not in [0, 1)")

    @property
    def qk_head_dim(self) -> int:
        """Query/key head dim: the part without RoPE plus the part with it."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


class TrainableMLA(nn.Module):
    """Latent attention with low-rank Q and KV and one rotated key shared by all heads.

    Parameters: `wq`, or `wq_a`, `q_norm`, `wq_b` with a query rank; `wkv_a`
    (R + P rows), `kv_norm`, `wkv_b`, `wo`. RoPE pairs adjacent dimensions, as
    TorchTitan's complex tables do (DeepSeek-V3 paper, section 2.1.1).

    Built inside vLLM's model construction it is bound to one paged latent
    cache and uses that while vLLM runs a forward; everywhere else it is an
    ordinary differentiable module. Both read the same `wkv_b`.
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
        # Not a submodule: the adapter owns the paged layers, the state dict stays the user's.
        self._paged: PagedLatentLayer | None = None

    tp_size = 1
    """Tensor-parallel ranks among which the heads were divided; see `attention.shard`."""

    def head_counts(self) -> dict[str, int]:
        """The counts that tensor parallelism divides; the latent cache is the same on all ranks."""
        return {"num_heads": self.config.num_heads}

    def shard(self, tp_size: int) -> None:
        """Keep one of `tp_size` equal shares of the heads."""
        self.config = replace(self.config, num_heads=self.config.num_heads // tp_size)
        self.tp_size = tp_size

    @property
    def spec(self) -> AttentionSpec:
        """Scale and causality, as the kernels take them."""
        c = self.config
        scale = c.qk_head_dim**-0.5 if c.scale is None else c.scale
        return AttentionSpec(scale=scale, causal=c.causal)

    def bind(self, layer: PagedLatentLayer) -> None:
        """Use `layer` whenever vLLM runs a forward."""
        self._paged = layer

    def __getstate__(self) -> dict[str, Any]:
        # A copy (deepcopy, pickle) is a plain trainable module: one cache has one owner.
        return {**self.__dict__, "_paged": None}

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
        at = token_positions(hidden_states, positions, cu_seqlens)
        table = remembered_table(self, freqs_cis)

        def rotate(q_pe: torch.Tensor, k_pe: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return apply_rope(q_pe, table, at), apply_rope(k_pe, table, at)

        return self.attend(hidden_states, rotate, cu_seqlens)

    def attend(
        self, hidden_states: torch.Tensor, rotate: Rotate, cu_seqlens: torch.Tensor | None
    ) -> torch.Tensor:
        """The block around a RoPE of the caller's; `[T, D]` or `[B, L, D]`."""
        c, lead = self.config, hidden_states.shape[:-1]
        flat = hidden_states.flatten(0, -2)
        q_nope, q_pe = self._queries(flat).split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        latent, k_pe = self.wkv_a(flat).split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        q_pe, k_pe = rotate(q_pe, k_pe.unsqueeze(1))
        q = torch.cat([q_nope, q_pe], dim=-1)
        out = self._attention(q, self.kv_norm(latent), k_pe.squeeze(1), lead, cu_seqlens)
        projected: torch.Tensor = self.wo(out.flatten(1).unflatten(0, lead))
        return projected

    def _attention(
        self,
        q_TNH: torch.Tensor,
        kv_c_TR: torch.Tensor,
        k_pe_TP: torch.Tensor,
        lead: torch.Size,
        cu_seqlens: torch.Tensor | None,
    ) -> torch.Tensor:
        if self._paged is not None and self._paged.active():
            return self._paged(q_TNH, kv_c_TR, k_pe_TP)
        batch = current_batch()
        if batch is not None and batch.serving:
            raise RuntimeError(
                "a TrainableMLA without a KV cache runs in the engine. Each must be a registered "
                "submodule of the model that the factory returns (not in a plain list or dict), "
                "and may not be added to a live model"
            )
        borders = sample_borders(self, lead, cu_seqlens)
        dropout = self.config.dropout if self.training else 0.0
        restore_weights(self.wkv_b)  # read here without a call of the layer
        weight = self.wkv_b.weight
        return attend_latent(q_TNH, kv_c_TR, k_pe_TP, weight, borders, self.spec, dropout)

    def _queries(self, x_TD: torch.Tensor) -> torch.Tensor:
        c = self.config
        q = self.wq(x_TD) if c.q_lora_rank == 0 else self.wq_b(self.q_norm(self.wq_a(x_TD)))
        heads: torch.Tensor = q.unflatten(-1, (-1, c.qk_head_dim))
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
