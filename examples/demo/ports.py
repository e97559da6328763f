"""The two models of TorchTitan's that the demo serves, and what vLLM has beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import DeepseekV3Config, Qwen3Config

from examples.custom_models import deepseek_v3_torchtitan as deepseek_v3
from examples.custom_models import qwen3_torchtitan as qwen3
from examples.demo.text import VOCAB_SIZE

MAX_LENGTH = 512


@dataclass(frozen=True, kw_only=True)
class Port:
    """One model, as Graft and as vLLM know it."""

    title: str
    arch: str
    """The example's architecture, built by `factory`."""
    factory: Callable[..., Any]
    hf_config: Any
    native_options: dict[str, Any] = field(default_factory=dict)
    """For the engine that runs vLLM's own model."""


COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": MAX_LENGTH,
    "bos_token_id": None,
    "eos_token_id": 0,
    "dtype": "float32",
}

QWEN3_CONFIG = Qwen3Config(
    architectures=["Qwen3ForCausalLM"],
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    tie_word_embeddings=True,
    initializer_range=0.04,
    **COMMON,
)

DEEPSEEK_V3_CONFIG = DeepseekV3Config(
    architectures=["DeepseekV3ForCausalLM"],
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_attention_heads=8,
    num_key_value_heads=8,
    # DeepSeek V3's own sizes of a head and of what is cached: 512 + 64 numbers per token.
    kv_lora_rank=512,
    qk_rope_head_dim=64,
    qk_nope_head_dim=128,
    v_head_dim=128,
    q_lora_rank=96,
    n_routed_experts=16,
    n_shared_experts=1,
    num_experts_per_tok=4,
    moe_intermediate_size=96,
    n_group=4,
    topk_group=2,
    num_nextn_predict_layers=0,
    initializer_range=0.08,
    # Transformers knows no other values and vLLM reads them.
    topk_method="noaux_tc",
    scoring_func="sigmoid",
    **COMMON,
)

QWEN3 = Port(
    title="Qwen3",
    arch=qwen3.ARCH,
    factory=qwen3.build_qwen3_torchtitan,
    hf_config=QWEN3_CONFIG,
)

DEEPSEEK_V3 = Port(
    title="DeepSeek V3",
    arch=deepseek_v3.ARCH,
    factory=deepseek_v3.build_deepseek_v3_torchtitan,
    hf_config=DEEPSEEK_V3_CONFIG,
    # vLLM 0.32's kernel for RoPE on CPU misreads queries of its own DeepSeek V3.
    native_options={"compilation_config": {"custom_ops": ["-rotary_embedding"]}},
)
