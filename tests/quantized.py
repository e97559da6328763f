"""A quantization method of our own for vLLM: int8 weights and activations, made on load.

vLLM 0.32 has no online method for linear layers that runs without AMX on CPU. This one is
registered as a user would, and multiplies by vLLM's own int8 kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.kernels.linear import init_int8_linear_kernel
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

NAME = "int8_on_load"


@register_quantization_config(NAME)
class Int8OnLoad(QuantizationConfig):
    """int8 per row of the weight and per token, for every linear layer."""

    def get_name(self) -> str:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Int8OnLoad:
        return cls()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        return Int8Linear() if isinstance(layer, LinearBase) else None


class Int8Linear(UnquantizedLinearMethod):
    """Loads as an unquantized layer does, then keeps int8 only."""

    def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, *args, **kwargs)
        self.kernel = init_int8_linear_kernel(
            is_channelwise=True,
            is_static_input_scheme=False,
            input_symmetric=True,
            module_name=type(self).__name__,
        )

    def process_weights_after_loading(self, layer: Any) -> None:
        weight = layer.weight.detach().float()
        scale = weight.abs().amax(1, keepdim=True) / 127
        layer.weight = parameter((weight / scale).round().to(torch.int8))
        layer.weight_scale = parameter(scale)
        layer.logical_widths = [len(scale)]
        layer.input_scale = layer.input_zero_point = layer.azp_adj = None
        self.kernel.process_weights_after_loading(layer)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.kernel.apply_weights(layer, x, bias)


def parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    """A parameter without gradient."""
    return torch.nn.Parameter(tensor, requires_grad=False)
