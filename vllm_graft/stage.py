"""What a model holds where another pipeline stage has its modules. Torch only."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class OtherStage(nn.Module):
    """Stands in a model where another pipeline stage holds the layer, embedding, norm or head.

    It passes its first argument on, so the model's forward reads the same on every stage.
    Loading leaves the checkpoint's tensors for such places to the stages that hold them.
    """

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`hidden_states`, as they came."""
        return hidden_states


def other_stages(model: nn.Module) -> list[str]:
    """The qualified names of the places in `model` that other stages fill."""
    return [name for name, module in model.named_modules() if isinstance(module, OtherStage)]
