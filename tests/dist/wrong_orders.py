"""Factories that break the order create -> replace -> TP -> dtype, for the refusals."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from examples.custom_models import megatron_gpt
from examples.custom_models.deepseek_v3_config import deepseek_v3_config
from examples.custom_models.deepseek_v3_torchtitan import DeepSeekV3TorchTitanForCausalLM
from examples.custom_models.qwen3_torchtitan import Qwen3TorchTitanForCausalLM, qwen3_config
from tests.dist.dtensor_plan import PLAN, PlainForCausalLM, plain_model
from vllm_graft import ParallelContext, replace_with_trainable_attention
from vllm_graft.families.torchtitan_tp import TitanParallel


def titan_without_tp(vllm_config: Any, parallel_context: Any) -> nn.Module:
    """No tensor parallelism at all."""
    model = Qwen3TorchTitanForCausalLM(vllm_config, parallel_context)
    return model.to(dtype=vllm_config.model_config.dtype)


def titan_tp_first(vllm_config: Any, parallel_context: Any) -> nn.Module:
    """Tensor parallelism first, attention replacement second."""
    config = qwen3_config(vllm_config.hf_config, vllm_config.model_config.max_model_len)
    decoder = config.build()
    TitanParallel(decoder, parallel_context)
    replace_with_trainable_attention(decoder)
    return decoder


def deepseek_without_tp(vllm_config: Any, parallel_context: Any) -> nn.Module:
    """Latent attention and experts, no tensor parallelism."""
    model = DeepSeekV3TorchTitanForCausalLM(vllm_config, parallel_context)
    return model.to(dtype=vllm_config.model_config.dtype)


def deepseek_tp_first(vllm_config: Any, parallel_context: Any) -> nn.Module:
    """Tensor parallelism first, replacement of latent attention second."""
    length = vllm_config.model_config.max_model_len
    decoder = deepseek_v3_config(vllm_config.hf_config, length).build()
    TitanParallel(decoder, parallel_context)
    replace_with_trainable_attention(decoder, use_mla=True)
    return decoder


def megatron_without_tp(vllm_config: Any, parallel_context: Any) -> nn.Module:
    """Megatron's model built for one rank."""
    return megatron_gpt.build_megatron_model(vllm_config, ParallelContext())


def megatron_not_replaced(vllm_config: Any, parallel_context: Any) -> nn.Module:
    """Megatron's model with its own attention."""
    model = nn.Module.__new__(megatron_gpt.MegatronForCausalLM)
    nn.Module.__init__(model)
    config, group = vllm_config.model_config, parallel_context.get_tp_process_group()
    model.model = megatron_gpt.gpt_model(vllm_config.hf_config, 512, config.dtype, group)
    return model


def plan_without_tp(vllm_config: Any, parallel_context: Any) -> nn.Module:
    """A hand-written model, its plan not applied."""
    return PlainForCausalLM(vllm_config)


def plan_ungathered(vllm_config: Any, parallel_context: Any) -> nn.Module:
    """A plan that leaves each rank the logits of its part of the vocabulary."""
    model = PlainForCausalLM(vllm_config)
    plan = PLAN | {"output": ColwiseParallel()}
    parallelize_module(model.model, parallel_context.tp_mesh(), plan)
    return model


def plan_first(vllm_config: Any, parallel_context: Any) -> nn.Module:
    """The plan first, attention replacement second."""
    decoder = plain_model(vllm_config.hf_config)
    parallelize_module(decoder, parallel_context.tp_mesh(), PLAN)
    replace_with_trainable_attention(decoder)
    return decoder


def for_other_tokens(vllm_config: Any, parallel_context: Any) -> nn.Module:
    """TorchTitan's own expert parallelism, for which every rank has other tokens."""
    from torchtitan.models.qwen3.sharding import set_qwen3_sharding_config

    config = qwen3_config(vllm_config.hf_config, vllm_config.model_config.max_model_len)
    set_qwen3_sharding_config(config, enable_sp=False, enable_ep=True)
    decoder = config.build()
    replace_with_trainable_attention(decoder)
    TitanParallel(decoder, parallel_context)
    return decoder
