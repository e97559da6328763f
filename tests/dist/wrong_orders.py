"""Factories that break the order create -> replace -> TP -> dtype, for the refusals."""

from __future__ import annotations

from typing import Any

from torch import nn

from examples.custom_models.qwen3_torchtitan import Qwen3TorchTitanForCausalLM, qwen3_config
from vllm_graft import replace_with_trainable_attention
from vllm_graft.families.torchtitan_tp import TitanParallel


def forgotten(vllm_config: Any, parallel_context: Any) -> nn.Module:
    """No tensor parallelism at all."""
    model = Qwen3TorchTitanForCausalLM(vllm_config, parallel_context)
    return model.to(dtype=vllm_config.model_config.dtype)


def before_replacement(vllm_config: Any, parallel_context: Any) -> nn.Module:
    """Tensor parallelism first, attention replacement second."""
    config = qwen3_config(vllm_config.hf_config, vllm_config.model_config.max_model_len)
    decoder = config.build()
    TitanParallel(decoder, parallel_context)
    replace_with_trainable_attention(decoder)
    return decoder
