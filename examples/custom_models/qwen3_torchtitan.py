"""Qwen3 through TorchTitan's own model: served by vLLM, trained by autograd.

As a script::

    python examples/custom_models/qwen3_torchtitan.py CHECKPOINT --prompt "Once upon a time"

In code::

    import vllm_graft
    vllm_graft.register("Qwen3TorchTitan", build_qwen3_torchtitan)
    llm = LLM(CHECKPOINT, hf_overrides={"architectures": ["Qwen3TorchTitan"]})

Any Qwen3 checkpoint in Hugging Face format works, dense or mixture of experts
(`model_type` qwen3 or qwen3_moe). A config field that TorchTitan's model cannot
honour is refused by name.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from vllm_graft.examples.refusals import refuse_fields
from vllm_graft.examples.script import run
from vllm_graft.examples.torchtitan_model import TorchTitanForCausalLM
from vllm_graft.examples.torchtitan_moe import feed_forward_names, ffn_config, moe_config
from vllm_graft.examples.torchtitan_stages import keep_stage

ARCH = "Qwen3TorchTitan"

NAME_MAPPING = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.layers.{}.self_attn.q_proj.weight": "layers.{}.attention.qkv_linear.wq.weight",
    "model.layers.{}.self_attn.k_proj.weight": "layers.{}.attention.qkv_linear.wk.weight",
    "model.layers.{}.self_attn.v_proj.weight": "layers.{}.attention.qkv_linear.wv.weight",
    "model.layers.{}.self_attn.o_proj.weight": "layers.{}.attention.wo.weight",
    "model.layers.{}.self_attn.q_norm.weight": "layers.{}.attention.q_norm.weight",
    "model.layers.{}.self_attn.k_norm.weight": "layers.{}.attention.k_norm.weight",
    "model.layers.{}.input_layernorm.weight": "layers.{}.attention_norm.weight",
    "model.layers.{}.post_attention_layernorm.weight": "layers.{}.ffn_norm.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
    **feed_forward_names([False]),
}
"""Hugging Face names of a dense Qwen3 to TorchTitan's. With tied embeddings both
vocabulary names lead to one tensor, and a checkpoint that has both must hold equal
values."""


class Qwen3TorchTitanForCausalLM(TorchTitanForCausalLM):
    """TorchTitan's `Qwen3Model` behind the four methods of the Custom Model API."""

    supports_pp = True

    def __init__(self, vllm_config: Any, parallel_context: Any = None, **kwargs: Any) -> None:
        hf_config = vllm_config.hf_config
        config = qwen3_config(hf_config, vllm_config.model_config.max_model_len)
        if parallel_context is not None:
            keep_stage(config, parallel_context)
        super().__init__(config, name_mapping(hf_config), use_mla=False)


def build_qwen3_torchtitan(vllm_config: Any, parallel_context: Any) -> nn.Module:
    """Factory for vLLM's model registry: create, replace attention, shard, cast."""
    model = Qwen3TorchTitanForCausalLM(vllm_config=vllm_config, parallel_context=parallel_context)
    model.parallelize(parallel_context)
    return model.to(dtype=vllm_config.model_config.dtype)


def name_mapping(hf_config: Any) -> dict[str, str]:
    """Hugging Face names to TorchTitan's for the layers that this checkpoint has."""
    names = {name: target for name, target in NAME_MAPPING.items() if ".mlp." not in name}
    return names | feed_forward_names(
        _is_sparse(hf_config, index) for index in range(hf_config.num_hidden_layers)
    )


def _is_sparse(hf_config: Any, index: int) -> bool:
    """Whether a layer has experts, as Transformers' `Qwen3MoeDecoderLayer` decides."""
    return (
        hf_config.model_type == "qwen3_moe"
        and index not in hf_config.mlp_only_layers
        and (index + 1) % hf_config.decoder_sparse_step == 0
    )


def qwen3_config(hf_config: Any, max_seq_len: int) -> Any:
    """TorchTitan's `Qwen3Model.Config` for a Hugging Face Qwen3 config.

    Args:
        hf_config: `Qwen3Config` or `Qwen3MoeConfig` of a checkpoint.
        max_seq_len: rows of the RoPE table, the longest sequence served or trained.

    Raises:
        ValueError: a field that TorchTitan's model cannot honour.
    """
    from torchtitan.models.common import Embedding, Linear
    from torchtitan.models.common.nn_modules import RMSNorm
    from torchtitan.models.qwen3.model import Qwen3Model
    from torchtitan.models.qwen3.sharding import set_qwen3_sharding_config

    refuse_unsupported(hf_config)
    dim, vocab_size = hf_config.hidden_size, hf_config.vocab_size
    init = {"weight": partial(nn.init.normal_, std=hf_config.initializer_range)}
    norm = partial(RMSNorm.Config, eps=hf_config.rms_norm_eps, param_init={"weight": nn.init.ones_})
    config = Qwen3Model.Config(
        vocab_size=vocab_size,
        dim=dim,
        norm=norm(normalized_shape=dim),
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
    set_qwen3_sharding_config(config, enable_sp=False, enable_ep=False)
    return config


def _inner_attention(window: int | None) -> Any:
    """What Graft replaces; only `VarlenAttention` can say that there is a window.

    On Hopper cards building a `VarlenAttention` loads FlashAttention 3's own package, which
    neither vLLM nor Graft needs.
    """
    from torchtitan.models.common.attention import ScaledDotProductAttention, VarlenAttention

    if window is None:
        return ScaledDotProductAttention.Config()
    # TorchTitan counts the keys before the query, Hugging Face the query too.
    return VarlenAttention.Config(window_size=(window - 1, 0))


def _layer_config(hf_config: Any, index: int, max_seq_len: int, norm: Any, init: Any) -> Any:
    from torchtitan.models.common import CosSinRoPE
    from torchtitan.models.common.config_utils import make_gqa_config
    from torchtitan.models.qwen3.model import Qwen3TransformerBlock

    dim, sparse = hf_config.hidden_size, _is_sparse(hf_config, index)
    head_dim = getattr(hf_config, "head_dim", None) or dim // hf_config.num_attention_heads
    attention = make_gqa_config(
        dim=dim,
        n_heads=hf_config.num_attention_heads,
        n_kv_heads=hf_config.num_key_value_heads,
        head_dim=head_dim,
        wqkv_param_init=init,
        wo_param_init=init,
        inner_attention=_inner_attention(_window(hf_config, index)),
        fuse_qkv=False,
        rope=CosSinRoPE.Config(
            dim=head_dim, max_seq_len=max_seq_len, theta=hf_config.rope_parameters["rope_theta"]
        ),
        qk_norm=norm(normalized_shape=head_dim),
    )
    return Qwen3TransformerBlock.Config(
        attention_norm=norm(normalized_shape=dim),
        ffn_norm=norm(normalized_shape=dim),
        attention=attention,
        feed_forward=None if sparse else ffn_config(dim, hf_config.intermediate_size, init),
        moe=_moe_config(hf_config, init) if sparse else None,
    )


def _moe_config(hf_config: Any, init: Any) -> Any:
    return moe_config(
        dim=hf_config.hidden_size,
        hidden_dim=hf_config.moe_intermediate_size,
        num_experts=hf_config.num_experts,
        top_k=hf_config.num_experts_per_tok,
        init=init,
        score_func="softmax",
        route_norm=hf_config.norm_topk_prob,
    )


def _window(hf_config: Any, index: int) -> int | None:
    # Qwen3-MoE has no list of layer types: its window, where it has one, is every layer's.
    kinds = getattr(hf_config, "layer_types", None)
    sliding = kinds is None or kinds[index] == "sliding_attention"
    return hf_config.sliding_window if sliding else None


def refuse_unsupported(hf_config: Any) -> None:
    """Raise for config fields that TorchTitan's Qwen3 does not implement.

    Raises:
        ValueError: naming each field, its value and the value that works.
    """
    refuse_fields(
        "TorchTitan's Qwen3",
        ("model_type", hf_config.model_type, ("qwen3", "qwen3_moe")),
        ("attention_bias", hf_config.attention_bias, (False,)),
        ("hidden_act", hf_config.hidden_act, ("silu",)),
        (
            "rope_parameters.rope_type",
            hf_config.rope_parameters.get("rope_type", "default"),
            ("default",),
        ),
        ("attention_dropout", hf_config.attention_dropout, (0.0,)),
        (
            "dual_chunk_attention_config",
            getattr(hf_config, "dual_chunk_attention_config", None),
            (None,),
        ),
        ("quantization_config", getattr(hf_config, "quantization_config", None), (None,)),
    )


def main() -> None:
    """Serve a checkpoint in this process and print completions."""
    run(ARCH, build_qwen3_torchtitan, "Serve Qwen3 through TorchTitan's own model.")


if __name__ == "__main__":
    main()
