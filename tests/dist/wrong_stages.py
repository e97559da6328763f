"""Factories whose models cannot run on several pipeline stages, for the refusals."""

from __future__ import annotations

from typing import Any

from torch import nn

from examples.custom_models.qwen3_torchtitan import Qwen3TorchTitanForCausalLM


class Unsupported(Qwen3TorchTitanForCausalLM):
    """Says no."""

    supports_pp = False


def unsupported(vllm_config: Any, parallel_context: Any) -> nn.Module:
    """A model that says no."""
    return Unsupported(vllm_config, parallel_context)


def whole(vllm_config: Any, parallel_context: Any) -> nn.Module:
    """A model that says yes, and is whole on every stage."""
    return Qwen3TorchTitanForCausalLM(vllm_config)
