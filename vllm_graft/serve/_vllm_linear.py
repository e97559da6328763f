"""vLLM's linear layer in place of `nn.Linear`: what its quantization and LoRA look for.

Relies on `ReplicatedLinear`, which builds its weights by
`quant_config.get_quant_method(layer, prefix)`, on `process_weights_after_loading` of every
`quant_method` in the model, and on `hf_to_vllm_mapper` of the model for names in adapters.
Can go when vLLM takes `nn.Linear` for both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def asked_for(vllm_config: Any) -> str | None:
    """What needs vLLM's linear layers, `"quantization"` or `"LoRA"`; None: nothing.

    A checkpoint that is quantized itself is no such thing: its loader dequantizes it.
    """
    if quantizes_on_load(vllm_config):
        return "quantization"
    return None if vllm_config.lora_config is None else "LoRA"


def quantizes_on_load(vllm_config: Any) -> bool:
    """Whether the engine is to quantize a checkpoint that is not quantized."""
    stored = getattr(vllm_config.model_config.hf_config, "quantization_config", None)
    return vllm_config.quant_config is not None and stored is None


def linear_like(old: nn.Linear, name: str, vllm_config: Any) -> nn.Module:
    """A layer of vLLM for `old`, with the same parameter names; values come with the checkpoint.

    Args:
        name: of the layer in vLLM's model, by which a quantization method may choose.
    """
    layer: nn.Module = _linear_class()(
        old.in_features,
        old.out_features,
        bias=old.bias is not None,
        params_dtype=old.weight.dtype,
        quant_config=vllm_config.quant_config if quantizes_on_load(vllm_config) else None,
        prefix=name,
        return_bias=False,
    )
    return layer.train(old.training)


def is_linear(module: nn.Module) -> bool:
    """Whether `linear_like` made `module`."""
    return isinstance(module, _linear_class())


@functools.cache
def _linear_class() -> Any:
    from vllm.model_executor.layers.linear import ReplicatedLinear

    class GraftLinear(ReplicatedLinear):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """`[..., K]` to `[..., M]`: vLLM's kernels take `[T, K]`."""
            out: torch.Tensor = super().forward(x.flatten(0, -2))
            return out.view(*x.shape[:-1], -1)

    return GraftLinear


def names_of_adapters(layer_of: Callable[[str], str]) -> Any:
    """What vLLM calls `hf_to_vllm_mapper`, for tensors of LoRA adapters.

    Args:
        layer_of: the layer in vLLM's model for the name that an adapter has for it.
    """
    from vllm.model_executor.models.utils import WeightsMapper

    class AdapterNames(WeightsMapper):  # type: ignore[misc]
        def get_rename_mapper(self) -> Any:
            return self

        def map_name(self, key: str) -> str:
            layer, mark, rest = key.partition(".lora_")
            return layer_of(layer) + mark + rest

        _map_name = map_name

    return AdapterNames()
