"""A DeepSeek V3 checkpoint's configuration in TorchTitan's words."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from torch import nn

from vllm_graft.examples.refusals import refuse_fields
from vllm_graft.examples.torchtitan_moe import ffn_config, moe_config

LATENT_NORM_EPS = 1e-6
"""Of `q_a_layernorm` and `kv_a_layernorm`: DeepSeek's code does not take it from the config."""
_MODEL = "TorchTitan's DeepSeek V3"
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
"""The quantization that is undone while loading."""


def deepseek_v3_config(hf_config: Any, max_seq_len: int) -> Any:
    """TorchTitan's `DeepSeekV3Model.Config` for a Hugging Face `DeepseekV3Config`.

    Args:
        hf_config: of a DeepSeek V3 checkpoint.
        max_seq_len: rows of the RoPE table, the longest sequence served or trained.

    Raises:
        ValueError: a field that TorchTitan's model cannot honour.
    """
    from torchtitan.models.common import Embedding, Linear
    from torchtitan.models.common.nn_modules import RMSNorm
    from torchtitan.models.deepseek_v3.model import DeepSeekV3Model
    from torchtitan.models.deepseek_v3.sharding import set_deepseek_v3_sharding_config

    refuse_unsupported(hf_config)
    dim, vocab_size = hf_config.hidden_size, hf_config.vocab_size
    init = {"weight": partial(nn.init.normal_, std=hf_config.initializer_range)}
    ones = {"weight": nn.init.ones_}
    # One config each: the sharding of the last norm is another than the layers'.
    norm = partial(
        RMSNorm.Config, normalized_shape=dim, eps=hf_config.rms_norm_eps, param_init=ones
    )
    config = DeepSeekV3Model.Config(
        vocab_size=vocab_size,
        dim=dim,
        norm=norm(),
        enable_weight_tying=hf_config.tie_word_embeddings,
        tok_embeddings=Embedding.Config(
            num_embeddings=vocab_size, embedding_dim=dim, param_init=init
        ),
        lm_head=Linear.Config(in_features=dim, out_features=vocab_size, param_init=init),
        layers=[
            _layer_config(hf_config, index, max_seq_len, norm, init)
            for index in range(hf_config.num_hidden_layers)
        ],
    )
    # Read by `parallelize` alone: on one rank it changes nothing.
    set_deepseek_v3_sharding_config(config, enable_sp=False, enable_ep=False)
    return config


def _layer_config(hf_config: Any, index: int, max_seq_len: int, norm: Any, init: Any) -> Any:
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.deepseek_v3 import make_mla_attention_config
    from torchtitan.models.deepseek_v3.model import DeepSeekV3TransformerBlock

    rope = hf_config.rope_parameters
    attention = make_mla_attention_config(
        layer_id=index,
        dim=hf_config.hidden_size,
        n_heads=hf_config.num_attention_heads,
        q_lora_rank=hf_config.q_lora_rank or 0,
        kv_lora_rank=hf_config.kv_lora_rank,
        qk_nope_head_dim=hf_config.qk_nope_head_dim,
        qk_rope_head_dim=hf_config.qk_rope_head_dim,
        v_head_dim=hf_config.v_head_dim,
        # Without it, Transformers leaves the softmax scale as it is; so does TorchTitan with 0.
        mscale=rope.get("mscale_all_dim") or 0.0,
        attn_backend="flex",
        linear_init=init,
        norm_init={"weight": nn.init.ones_},
        depth_init=lambda _: init,
        rope=_rope_config(rope, hf_config.qk_rope_head_dim, max_seq_len),
    )
    attention.q_norm.eps = attention.kv_norm.eps = LATENT_NORM_EPS
    # Graft replaces it; TorchTitan's others load kernels that neither vLLM nor Graft needs.
    attention.inner_attention = ScaledDotProductAttention.Config()
    sparse = is_sparse(hf_config, index)
    return DeepSeekV3TransformerBlock.Config(
        attention_norm=norm(),
        ffn_norm=norm(),
        attention=attention,
        feed_forward=None
        if sparse
        else ffn_config(hf_config.hidden_size, hf_config.intermediate_size, init),
        moe=_moe_config(hf_config, init) if sparse else None,
    )


def _rope_config(rope: dict[str, Any], dim: int, max_seq_len: int) -> Any:
    from torchtitan.models.common import ComplexRoPE

    base = partial(ComplexRoPE.Config, dim=dim, max_seq_len=max_seq_len, theta=rope["rope_theta"])
    if rope.get("rope_type", "default") == "default":
        return base()
    return base(
        scaling="yarn",
        rope_factor=rope["factor"],
        beta_fast=rope.get("beta_fast") or 32.0,
        beta_slow=rope.get("beta_slow") or 1.0,
        original_seq_len=rope["original_max_position_embeddings"],
        truncate=rope.get("truncate", True),
    )


def _moe_config(hf_config: Any, init: Any) -> Any:
    groups = hf_config.n_group or 1
    hidden_dim = hf_config.moe_intermediate_size
    return moe_config(
        dim=hf_config.hidden_size,
        hidden_dim=hidden_dim,
        num_experts=hf_config.n_routed_experts,
        top_k=hf_config.num_experts_per_tok,
        init=init,
        score_func="sigmoid",
        route_norm=hf_config.norm_topk_prob,
        route_scale=hf_config.routed_scaling_factor,
        expert_groups=(groups, hf_config.topk_group) if groups > 1 else None,
        shared_hidden_dim=hidden_dim * (hf_config.n_shared_experts or 0),
        router_bias=True,
    )


def refuse_unsupported(hf_config: Any) -> None:
    """Raise for config fields that TorchTitan's DeepSeek V3 does not implement.

    Raises:
        ValueError: naming each field, its value and the value that works.
    """
    heads = hf_config.num_attention_heads
    scoring = getattr(hf_config, "scoring_func", "sigmoid")
    method = getattr(hf_config, "topk_method", "noaux_tc")
    refuse_fields(
        _MODEL,
        ("model_type", hf_config.model_type, ("deepseek_v3",)),
        ("hidden_act", hf_config.hidden_act, ("silu",)),
        ("attention_bias", hf_config.attention_bias, (False,)),
        ("attention_dropout", hf_config.attention_dropout, (0.0, None)),
        ("num_key_value_heads", hf_config.num_key_value_heads, (heads, None)),
        ("scoring_func", scoring, ("sigmoid",)),
        ("topk_method", method, ("noaux_tc",)),
        *_rope_fields(hf_config.rope_parameters),
        *_quantization_fields(getattr(hf_config, "quantization_config", None)),
    )
    _check_groups(hf_config)


def _rope_fields(rope: dict[str, Any]) -> list[Any]:
    kind = rope.get("rope_type", "default")
    fields = [
        ("rope_parameters.rope_type", kind, ("default", "yarn")),
        ("rope_parameters.partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), (1.0,)),
    ]
    if kind == "yarn":
        # TorchTitan's cos|sin is a pure rotation.
        name = "rope_parameters: factor on cos and sin (attention_factor, mscale, mscale_all_dim)"
        fields.append((name, _table_factor(rope), (1.0,)))
    return fields


def _table_factor(rope: dict[str, Any]) -> float:
    """What Transformers multiplies cos and sin with (`_compute_yarn_parameters`)."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    above, below = rope.get("mscale"), rope.get("mscale_all_dim")
    if above and below:
        return _yarn_mscale(rope["factor"], above) / _yarn_mscale(rope["factor"], below)
    return _yarn_mscale(rope["factor"], 1.0)


def _yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's temperature (YaRN paper, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _quantization_fields(quantization: dict[str, Any] | None) -> list[Any]:
    return [
        (f"quantization_config.{name}", quantization.get(name), (supported,))
        for name, supported in FP8.items()
        if quantization
    ]


def _check_groups(hf_config: Any) -> None:
    """The chosen experts must fit into the open groups, and a group is ranked by two experts."""
    experts, groups, top_k = (
        hf_config.n_routed_experts, hf_config.n_group or 1, hf_config.num_experts_per_tok,
    )  # fmt: skip
    size, open_groups = experts // groups, hf_config.topk_group if groups > 1 else 1
    if experts % groups or (groups > 1 and size < 2) or not 0 < top_k <= open_groups * size:
        raise ValueError(
            f"{_MODEL} cannot honour n_routed_experts={experts}, n_group={groups}, "
            f"topk_group={open_groups}, num_experts_per_tok={top_k} (supported: n_group divides "
            "n_routed_experts into groups of 2 or more, and topk_group of them hold "
            "num_experts_per_tok experts)"
        )


def is_sparse(hf_config: Any, index: int) -> bool:
    """Whether a layer has experts, as DeepSeek's `DeepseekV3DecoderLayer` decides."""
    beyond_dense = index >= (hf_config.first_k_dense_replace or 0)
    return beyond_dense and index % (getattr(hf_config, "moe_layer_freq", None) or 1) == 0
