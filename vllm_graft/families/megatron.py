"""Megatron-core 0.16: attention with the seam `core_attention`.

Megatron computes RoPE from the length of its input. Here the seam applies it, from a table
and the positions of the running batch (`megatron_rope`), and Megatron is handed none.

Imports nothing of Megatron at module level. Legend as in `attention.core`; Megatron
itself says [s, b, np, hn] for [L, B, N, H].
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from vllm_graft.attention.core import CoreAttention
from vllm_graft.attention.flash import token_positions
from vllm_graft.families import megatron_layers, megatron_mla
from vllm_graft.families.megatron_rope import PositionRotary, check_rotary, table_of
from vllm_graft.families.swap import Swap, swap_of

KIND = "core_attention"


class MegatronCoreAttention(CoreAttention):
    """`CoreAttention` built and called as Megatron does with its core attention.

    Args:
        config: Megatron's `TransformerConfig`.
        layer_number: of the layer, from 1.
        attn_mask_type: must be causal.
        attention_dropout: `config.attention_dropout` by default.
        softmax_scale: `head_dim ** -0.5` by default.
        pg_collection: whose `tp` splits the heads.

    Raises:
        ValueError: a field of the configuration that it cannot honour.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str = "self",
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        ranks = 1 if pg_collection is None else pg_collection.tp.size()
        _refuse(config, attn_mask_type, attention_type, ranks)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        super().__init__(
            config.num_attention_heads,
            config.num_query_groups,
            config.kv_channels,
            scale=softmax_scale,
            sliding_window=_window(config, layer_number),
            dropout=dropout,
        )
        if ranks > 1:
            self.shard(ranks)
        no_rope = bool(config.no_rope_freq and config.no_rope_freq[layer_number - 1])
        self.rotates = not no_rope
        # In a tuple: the model owns the table.
        self.rotary: tuple[PositionRotary, ...] = ()

    def forward(  # type: ignore[override]
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attend to `[L, B, N, H]` (`[T, N, H]` with packed parameters); `[L, B, N * H]`.

        Args:
            attention_mask: ignored, as Megatron's flash attention does: attention is causal.
            packed_seq_params: Megatron's; its `cu_seqlens_q` are the borders of the samples.

        Raises:
            ValueError: an attention bias.
        """
        if attention_bias is not None:
            raise ValueError("attention_bias is not supported by CoreAttention; pass None")
        borders = None if packed_seq_params is None else packed_seq_params.cu_seqlens_q
        batch_first = [x.transpose(0, 1) if x.dim() == 4 else x for x in (query, key, value)]
        q, k, v = batch_first
        if self.rotary and self.rotates:
            at = token_positions(q[..., 0], None, borders)
            q, k = (self.rotary[0].rotate(x, at) for x in (q, k))
        out = super().forward(q, k, v, cu_seqlens=borders).flatten(-2)
        return out.transpose(0, 1) if query.dim() == 4 else out


def _refuse(config: Any, attn_mask_type: Any, attention_type: str, ranks: int) -> None:
    """Raise for what `CoreAttention` would not compute.

    Raises:
        ValueError: naming each field, its value and what works.
    """
    fields = {
        "attn_mask_type": (getattr(attn_mask_type, "name", attn_mask_type), ("causal",)),
        "attention_type": (attention_type, ("self",)),
        "softmax_type": (getattr(config, "softmax_type", "vanilla"), ("vanilla",)),
        "context_parallel_size": (config.context_parallel_size, (1,)),
        "flash_decode": (config.flash_decode, (False,)),
        "multi_latent_attention": (config.multi_latent_attention, (False,)),
    }
    wrong = [f"{n}={v!r} (supported: {w[0]!r})" for n, (v, w) in fields.items() if v not in w]
    if config.num_query_groups % ranks:
        wrong.append(
            f"num_query_groups={config.num_query_groups} with tensor parallelism over {ranks} "
            "ranks (supported: a divisor of it)"
        )
    if wrong:
        raise ValueError(f"CoreAttention cannot honour Megatron's {'; '.join(wrong)}")


def _window(config: Any, layer_number: int) -> int | None:
    """Keys that a query of this layer sees, itself included."""
    if config.window_size is None:
        return None
    every = config.window_attn_skip_freq
    if isinstance(every, int) and layer_number % every == 0:
        return None
    if isinstance(every, (list, tuple)) and not every[layer_number - 1]:
        return None
    left, right = config.window_size
    if right != 0:
        raise ValueError(f"Megatron's window_size=({left}, {right}) is not causal; use ({left}, 0)")
    return None if left < 0 else int(left) + 1


def matches(attention: nn.Module) -> bool:
    """Whether this is Megatron's attention with one product for Q, K and V."""
    return hasattr(attention, "core_attention") and hasattr(attention, "linear_qkv")


def plan(attention: Any) -> Swap:
    """Build what takes the seam, without touching the block.

    Raises:
        ValueError: a configuration that `CoreAttention` cannot honour.
    """
    if isinstance(attention.core_attention, MegatronCoreAttention):
        return swap_of(KIND, attention.core_attention)
    core = MegatronCoreAttention(
        attention.config,
        attention.layer_number,
        attention.attn_mask_type,
        attention.attention_type,
        softmax_scale=attention.config.softmax_scale,
        pg_collection=attention.pg_collection,
    )
    return swap_of(KIND, core, apply=partial(setattr, attention, "core_attention", core))


def check(model: Any) -> None:
    """Refuse a model with experts, or whose positions `adopt` could not take over.

    Raises:
        ValueError: naming the layer with experts, or the class of its rotary module.
    """
    layers = getattr(getattr(model, "decoder", None), "layers", ())
    for index, layer in enumerate(layers):
        mlp = getattr(layer, "mlp", None)
        if hasattr(mlp, "token_dispatcher"):
            raise ValueError(
                f"decoder.layers.{index}.mlp: Megatron's {type(mlp).__name__} is not supported: "
                "experts are served and trained through TorchTitan's models only"
            )
    seams = any(matches(getattr(layer, "self_attention", layer)) for layer in layers)
    rotary = getattr(model, "rotary_pos_emb", None)
    if seams and rotary is not None:
        check_rotary(rotary)


def adopt(model: Any) -> None:
    """What a swapped model needs beside its attention: exact layers, RoPE by position.

    Does nothing to a model of another family, or when called again.
    """
    if not megatron_layers.loaded():
        return
    megatron_layers.correct_layers(model)
    megatron_layers.note_shares(model)
    megatron_mla.adopt(model)
    cores = [m for m in model.modules() if isinstance(m, MegatronCoreAttention)]
    rotary = getattr(model, "rotary_pos_emb", None)
    if not cores or rotary is None:
        return
    if not isinstance(rotary, PositionRotary):
        rotary = model.rotary_pos_emb = table_of(rotary, model.max_sequence_length)
    for core in cores:
        core.rotary = (rotary,)
