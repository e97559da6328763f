"""Layers of Transformers' own, given results that do not depend on the batch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from vllm_graft.exact import linear, silu
from vllm_graft.families.transformers_moe import correct_experts


def correct_layers(model: nn.Module) -> None:
    """Give GPT-2's transposed linear layers, SiLU and experts in `model` their exact forwards."""
    from transformers.activations import SiLUActivation
    from transformers.pytorch_utils import Conv1D

    for module in model.modules():
        if isinstance(module, Conv1D):
            module.forward = partial(_conv1d, module)  # type: ignore[method-assign]
        elif isinstance(module, SiLUActivation):
            module.forward = silu  # type: ignore[method-assign]
    correct_experts(model)


def _conv1d(module: Any, x: torch.Tensor) -> torch.Tensor:
    return linear(x, module.weight.t(), module.bias)
