"""Where a model keeps its tensors.

vLLM exchanges the tensors of a module while it reloads, and breaks ties between
them. So a tensor is known by its slot: the module that owns it and the attribute.
"""

from __future__ import annotations

import torch
from torch import nn

Slot = tuple[nn.Module, str]


def slots(model: nn.Module) -> dict[str, Slot]:
    """Every name of every parameter and buffer, parameters first."""
    modules = list(model.named_modules(remove_duplicate=False))
    found: dict[str, Slot] = {}
    for kind in ("_parameters", "_buffers"):
        for prefix, module in modules:
            for attribute, tensor in getattr(module, kind).items():
                if tensor is not None:
                    found[f"{prefix}.{attribute}" if prefix else attribute] = (module, attribute)
    return found


def tensor_in(slot: Slot) -> torch.Tensor:
    """The tensor that the slot holds now."""
    tensor: torch.Tensor = getattr(*slot)
    return tensor


def tied_names(model: nn.Module) -> dict[Slot, str]:
    """One name for every slot: tied parameters go by the first."""
    first: dict[int, str] = {}
    return {
        slot: first.setdefault(id(tensor_in(slot)), name) for name, slot in slots(model).items()
    }


def on_meta(model: nn.Module) -> bool:
    """Whether vLLM's reload has put the tensors of `model` on meta."""
    return any(parameter.is_meta for parameter in model.parameters())
