"""Megatron-core 0.16: `MLASelfAttention`, served from the latent cache.

Megatron hands its core attention expanded keys and values, which cannot be served from the
latent cache. The block keeps its class, names and sharding; only its forward becomes
`TrainableMLA`'s. Megatron's local layer spec cannot build latent attention with its own core
attention, so the spec takes `LatentSeam` in its place (`with_latent_seam`).

Imports nothing of Megatron at module level. Legend as in `attention.mla`; Megatron
itself says [s, b, h] for [L, B, D].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from vllm_graft.attention.flash import token_positions
from vllm_graft.attention.mla import MLAConfig, TrainableMLA
from vllm_graft.families import megatron_parallel
from vllm_graft.families.megatron_rope import PositionRotary, check_rotary, table_of
from vllm_graft.families.swap import Swap

KIND = "mla"


class LatentSeam(nn.Module):
    """Holds the place of core attention until the block is swapped; has no parameters."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Nothing runs before the swap.

        Raises:
            RuntimeError: always, with the call that is missing.
        """
        raise RuntimeError(
            "latent attention was built with LatentSeam and never swapped; call "
            "replace_with_trainable_attention(model, use_mla=True) once the model is built"
        )


def with_latent_seam(layer_spec: Any) -> Any:
    """Megatron's layer spec, changed in place, with `LatentSeam` as its core attention."""
    from megatron.core.transformer import multi_latent_attention

    # Without Transformer Engine its classes are mocks, which Megatron 0.16 takes for real here.
    multi_latent_attention.HAVE_TE &= isinstance(multi_latent_attention.TELinear, type)
    layer_spec.submodules.self_attention.submodules.core_attention = LatentSeam
    return layer_spec


class MegatronMLA(TrainableMLA):
    """Called as Megatron calls `MLASelfAttention`, with its parts under its names."""

    linear_kv_up_proj: nn.Module
    linear_kv_down_proj: nn.Module
    linear_proj: nn.Module
    kv_layernorm: nn.Module
    rotary_pos_emb: PositionRotary
    tp_group: Any

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *args: Any,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend to `[L, B, D]`; the result and the bias that Megatron adds later.

        Args:
            attention_mask: ignored: attention is causal.
            packed_seq_params: Megatron's; its `cu_seqlens_q` are the borders of the samples.

        Raises:
            ValueError: an argument that latent attention would ignore.
        """
        given = [name for name, value in kwargs.items() if value is not None]
        if given or any(value is not None for value in args):
            raise ValueError(
                f"MegatronMLA takes no {', '.join(given) or 'further positional arguments'}: vLLM "
                "has the cache, and RoPE comes from the positions of the batch"
            )
        borders = None if packed_seq_params is None else packed_seq_params.cu_seqlens_q
        x_BLD = hidden_states.transpose(0, 1)
        at, table = token_positions(x_BLD, None, borders), self.rotary_pos_emb

        def rotate(q_pe: torch.Tensor, k_pe: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return table.rotate(q_pe, at), self._for_all_ranks(table.rotate(k_pe, at))

        out_BLD = self.attend(x_BLD, rotate, borders)
        bias = self.linear_proj.bias if self.linear_proj.skip_bias_add else None
        return out_BLD.transpose(0, 1), bias  # type: ignore[return-value]

    # The parts of `TrainableMLA`. Megatron's linear layers return their bias beside the result.
    @property
    def wq(self) -> Callable[[torch.Tensor], torch.Tensor]:  # type: ignore[override]
        """Queries `[..., N * (C + P)]` without compression."""
        return partial(_whole, self.linear_q_proj)

    @property
    def wq_a(self) -> Callable[[torch.Tensor], torch.Tensor]:  # type: ignore[override]
        """Compressed queries."""
        return partial(_whole, self.linear_q_down_proj, width=self.config.q_lora_rank)

    @property
    def wq_b(self) -> Callable[[torch.Tensor], torch.Tensor]:  # type: ignore[override]
        """Queries from compressed ones."""
        return partial(_whole, self.linear_q_up_proj)

    @property
    def wkv_a(self) -> Callable[[torch.Tensor], torch.Tensor]:  # type: ignore[override]
        """Latent vectors and keys for RoPE, `[..., R + P]`."""
        width = self.config.kv_lora_rank + self.config.qk_rope_head_dim
        return partial(_whole, self.linear_kv_down_proj, width=width)

    @property
    def wkv_b(self) -> nn.Module:  # type: ignore[override]
        """Keys and values of this rank's heads from latent vectors."""
        return self.linear_kv_up_proj

    @property
    def wo(self) -> Callable[[torch.Tensor], torch.Tensor]:  # type: ignore[override]
        """The output projection."""
        return partial(_whole, self.linear_proj)

    @property
    def q_norm(self) -> nn.Module:  # type: ignore[override]
        """Norm of compressed queries."""
        return self.q_layernorm  # type: ignore[return-value]

    @property
    def kv_norm(self) -> Callable[[torch.Tensor], torch.Tensor]:  # type: ignore[override]
        """Norm of latent vectors."""
        return self._latent_norm

    def _latent_norm(self, latent: torch.Tensor) -> torch.Tensor:
        return self._for_all_ranks(self.kv_layernorm(latent))

    def _for_all_ranks(self, x: torch.Tensor) -> torch.Tensor:
        """`x`, which every rank has for its own heads: gradients are summed over the ranks."""
        return megatron_parallel.copy_to(x, self.tp_group) if self.tp_size > 1 else x


def _whole(linear: Any, x: torch.Tensor, *, width: int | None = None) -> torch.Tensor:
    """A linear layer's result; where the ranks share `width` columns, those of all ranks."""
    out: torch.Tensor = linear(x)[0]
    if width is None or out.shape[-1] == width:
        return out
    return megatron_parallel.gather(out, linear.tp_group)


def matches(attention: nn.Module) -> bool:
    """Whether this is Megatron's latent attention."""
    return hasattr(attention, "linear_kv_down_proj") and hasattr(attention, "linear_proj")


def plan(attention: Any) -> Swap:
    """Prepare the change of forward, without touching the block.

    Raises:
        ValueError: the block computes something that `TrainableMLA` would not.
    """
    if isinstance(attention, TrainableMLA):
        return _swap(attention.config)
    _refuse(attention)
    config = _config_of(attention)
    return _swap(config, apply=partial(_become, attention, config))


def _swap(config: MLAConfig, **rest: Any) -> Swap:
    cached = config.kv_lora_rank + config.qk_rope_head_dim
    return Swap(kind=KIND, num_heads=config.num_heads, num_kv_heads=1, head_dim=cached, **rest)


def _become(attention: Any, config: MLAConfig) -> None:
    ranks = attention.config.num_attention_heads // config.num_heads
    attention.__class__ = _merged(type(attention))  # type: ignore[arg-type]
    # Megatron's own `config` stays reachable through the layer; this is `TrainableMLA`'s.
    attention.megatron_config, attention.config = attention.config, config
    attention._paged, attention.tp_size = None, ranks
    del attention.core_attention


@functools.cache
def _merged(old_class: Any) -> Any:
    """`old_class` with the forward of `MegatronMLA`; still an instance of both."""
    return type(f"MegatronMLA{old_class.__name__}", (MegatronMLA, old_class), {})


def adopt(model: nn.Module) -> None:
    """Give every swapped block the one RoPE table of the model."""
    tables: dict[int, PositionRotary] = {}
    for block in model.modules():
        if isinstance(block, MegatronMLA) and not isinstance(block.rotary_pos_emb, PositionRotary):
            fields: Any = block.megatron_config
            rows = getattr(model, "max_sequence_length", fields.original_max_position_embeddings)
            known = tables.get(id(fields))
            tables[id(fields)] = known or table_of(block.rotary_pos_emb, rows, unzip=True)
            block.rotary_pos_emb = tables[id(fields)]


def _config_of(attention: Any) -> MLAConfig:
    c = attention.config
    return MLAConfig(
        hidden_size=c.hidden_size,
        num_heads=attention.num_attention_heads_per_partition,
        q_lora_rank=c.q_lora_rank or 0,
        kv_lora_rank=c.kv_lora_rank,
        qk_nope_head_dim=c.qk_head_dim,
        qk_rope_head_dim=c.qk_pos_emb_head_dim,
        v_head_dim=c.v_head_dim,
        norm_eps=c.layernorm_epsilon,
        dropout=c.attention_dropout,
        scale=attention.softmax_scale,
    )


def _refuse(attention: Any) -> None:
    """Raise for what `TrainableMLA` would not compute.

    Raises:
        ValueError: naming it, and what works.
    """
    c, kind = attention.config, type(attention).__name__
    if kind != "MLASelfAttention":
        raise ValueError(f"{kind} is not Megatron's MLASelfAttention, whose arithmetic is known")
    check_rotary(attention.rotary_pos_emb)
    if hasattr(attention.linear_kv_up_proj, "layer_norm_weight"):
        raise ValueError(
            "linear_kv_up_proj has a fused layer norm, whose result cannot be cached; build the "
            "model with get_gpt_layer_local_spec"
        )
    ranks = c.num_attention_heads // attention.num_attention_heads_per_partition
    fields = {
        "attn_mask_type": (attention.attn_mask_type.name, "causal"),
        "rotary_interleaved": (c.rotary_interleaved, False),
        "cache_mla_latents": (c.cache_mla_latents, False),
        "context_parallel_size": (c.context_parallel_size, 1),
        "sequence_parallel": (c.sequence_parallel, False),
        "linear_kv_up_proj.bias": (attention.linear_kv_up_proj.bias is not None, False),
        # Megatron builds `linear_q_proj` without a process group.
        "q_lora_rank with several ranks": (ranks > 1 and c.q_lora_rank is None, False),
    }
    wrong = [f"{n}={v!r} (supported: {w!r})" for n, (v, w) in fields.items() if v != w]
    if wrong:
        raise ValueError(f"TrainableMLA cannot honour Megatron's {'; '.join(wrong)}")
