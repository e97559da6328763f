"""A Hugging Face configuration of Llama, Qwen2, Qwen3 or DeepSeek V3 in Megatron's words."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from vllm_graft.examples.refusals import refuse_fields
from vllm_graft.order import ORDER

_MODEL = "Megatron's GPTModel"
MODEL_TYPES = ("llama", "qwen2", "qwen3", "deepseek_v3")
LATENT_NORM_EPS = 1e-6
"""Of `q_a_layernorm` and `kv_a_layernorm`: DeepSeek's code does not take it from the config."""
LATENT = "deepseek_v3"
"""The one with latent attention."""
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Megatron's `rope_scaling` has these numbers built in."""


def transformer_config(hf_config: Any, dtype: torch.dtype, tp_size: int) -> Any:
    """Megatron's `TransformerConfig`, or `MLATransformerConfig` for latent attention.

    Args:
        hf_config: of the checkpoint; `refuse_unsupported` has passed it.
        dtype: of the parameters.
        tp_size: tensor-parallel ranks.
    """
    from megatron.core.transformer.transformer_config import (
        MLATransformerConfig,
        TransformerConfig,
    )

    if hf_config.model_type == LATENT:
        return MLATransformerConfig(
            **_common_fields(hf_config, dtype, tp_size), **_latent_fields(hf_config)
        )
    return TransformerConfig(
        **_common_fields(hf_config, dtype, tp_size),
        num_query_groups=hf_config.num_key_value_heads,
        kv_channels=head_dim(hf_config),
        qk_layernorm=hf_config.model_type == "qwen3",
        add_qkv_bias=hf_config.model_type == "qwen2",
        **_window_fields(hf_config),
    )


def _common_fields(hf_config: Any, dtype: torch.dtype, tp_size: int) -> dict[str, Any]:
    return {
        "num_layers": hf_config.num_hidden_layers,
        "hidden_size": hf_config.hidden_size,
        "ffn_hidden_size": hf_config.intermediate_size,
        "num_attention_heads": hf_config.num_attention_heads,
        "layernorm_epsilon": hf_config.rms_norm_eps,
        "normalization": "RMSNorm",
        "activation_func": F.silu,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": hf_config.attention_dropout or 0.0,
        "params_dtype": dtype,
        "tensor_model_parallel_size": tp_size,
        "use_cpu_initialization": not torch.cuda.is_available(),
        # On CUDA it needs Megatron's random-number tracker; `gpt_model` initializes.
        "perform_initialization": False,
    }


def _latent_fields(hf_config: Any) -> dict[str, Any]:
    rope = hf_config.rope_parameters
    fields = {
        "qk_layernorm": True,
        "q_lora_rank": hf_config.q_lora_rank,
        "kv_lora_rank": hf_config.kv_lora_rank,
        "qk_head_dim": hf_config.qk_nope_head_dim,
        "qk_pos_emb_head_dim": hf_config.qk_rope_head_dim,
        "v_head_dim": hf_config.v_head_dim,
        "rotary_base": rope["rope_theta"],
    }
    if rope.get("rope_type", "default") == "default":
        # The scaling factor of YaRN enters the softmax scale whatever the type.
        return fields | {"rope_type": "rope", "rotary_scaling_factor": 1.0}
    return fields | {
        "rope_type": "yarn",
        "rotary_scaling_factor": rope["factor"],
        "original_max_position_embeddings": rope["original_max_position_embeddings"],
        "beta_fast": rope.get("beta_fast") or 32.0,
        "beta_slow": rope.get("beta_slow") or 1.0,
        "mscale": rope.get("mscale") or 1.0,
        "mscale_all_dim": rope.get("mscale_all_dim") or 0.0,
    }


def head_dim(hf_config: Any) -> int:
    """H, which not every configuration states."""
    stated = getattr(hf_config, "head_dim", None)
    return int(stated or hf_config.hidden_size // hf_config.num_attention_heads)


def _window_fields(hf_config: Any) -> dict[str, Any]:
    kinds = getattr(hf_config, "layer_types", None) or []
    sliding = [int(kind == "sliding_attention") for kind in kinds]
    if not any(sliding):
        return {}
    # Megatron counts the keys before the query, Hugging Face the query too.
    return {
        "window_size": (hf_config.sliding_window - 1, 0),
        "window_attn_skip_freq": sliding,
    }


def rope_fields(hf_config: Any) -> dict[str, Any]:
    """What `GPTModel` itself takes about positions; latent attention has its own."""
    if hf_config.model_type == LATENT:
        return {"position_embedding_type": "rope"}
    rope = hf_config.rope_parameters
    fields = {"position_embedding_type": "rope", "rotary_base": rope["rope_theta"]}
    if rope.get("rope_type", "default") == "llama3":
        fields |= {"rope_scaling": True, "rope_scaling_factor": rope["factor"]}
    return fields


def refuse_unsupported(hf_config: Any, tp_size: int) -> None:
    """Raise for config fields that Megatron's model would not honour.

    Raises:
        ValueError: naming each field, its value and the values that work.
    """
    _refuse_experts(hf_config)
    refuse_fields(_MODEL, ("model_type", hf_config.model_type, MODEL_TYPES))
    rope = hf_config.rope_parameters
    kind = rope.get("rope_type", "default")
    latent = hf_config.model_type == LATENT
    scaled = _LLAMA3 if kind == "llama3" else {}
    refuse_fields(
        _MODEL,
        ("hidden_act", hf_config.hidden_act, ("silu",)),
        ("attention_bias", getattr(hf_config, "attention_bias", False), (False,)),
        ("mlp_bias", getattr(hf_config, "mlp_bias", False), (False,)),
        ("pretraining_tp", getattr(hf_config, "pretraining_tp", 1), (1,)),
        ("quantization_config", getattr(hf_config, "quantization_config", None), (None,)),
        (
            "dual_chunk_attention_config",
            getattr(hf_config, "dual_chunk_attention_config", None),
            (None,),
        ),
        ("rope_parameters.rope_type", kind, ("default", "yarn" if latent else "llama3")),
        ("rope_parameters.partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), (1.0,)),
        *((f"rope_parameters.{name}", rope.get(name), (value,)) for name, value in scaled.items()),
        *(_latent_refusals(hf_config, kind, tp_size) if latent else ()),
    )
    _refuse_indivisible(hf_config, tp_size)


def _refuse_experts(hf_config: Any) -> None:
    sparse = hf_config.num_hidden_layers - getattr(hf_config, "first_k_dense_replace", 0)
    for field in ("n_routed_experts", "num_experts", "num_local_experts"):
        experts = getattr(hf_config, field, None)
        if experts and sparse > 0:
            raise ValueError(
                f"{_MODEL} is served without experts, and this checkpoint has them ({field}="
                f"{experts}); TorchTitan's models serve "
                "experts, as Qwen3TorchTitan (qwen3_moe) or DeepSeekV3TorchTitan (deepseek_v3)"
            )


def _latent_refusals(hf_config: Any, kind: str, tp_size: int) -> list[Any]:
    rope = hf_config.rope_parameters
    fields: list[Any] = []
    if tp_size > 1:
        # Megatron gives that projection no process group.
        fields.append(("q_lora_rank is None", hf_config.q_lora_rank is None, (False,)))
    if kind == "yarn":
        both = bool(rope.get("mscale")) == bool(rope.get("mscale_all_dim"))
        fields += [
            ("rope_parameters.attention_factor", rope.get("attention_factor"), (None,)),
            ("rope_parameters.truncate", rope.get("truncate", True), (True,)),
            ("rope_parameters: mscale and mscale_all_dim both or neither", both, (True,)),
        ]
    return fields


def _refuse_indivisible(hf_config: Any, tp_size: int) -> None:
    fields = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
    wrong = [f"{n}={getattr(hf_config, n)}" for n in fields if getattr(hf_config, n) % tp_size]
    if wrong:
        raise ValueError(
            f"{_MODEL} cannot split {', '.join(wrong)} over tensor_parallel_size={tp_size}; "
            f"use a size that divides all of them (the order is {ORDER}; Megatron shards "
            "as it creates the model)"
        )
