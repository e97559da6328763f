"""Where the parts of a decoder are, by role and not by one library's names. Torch only.

The same walk is made through the adapted model and through the reference, so that what both
have under one role can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

_ATTENTION = ("self_attn", "self_attention", "attention", "attn")
_LAYERS = ("layers", "h", "blocks", "block")
_PARTS = {
    "q": ("q_proj", "wq"),
    "k": ("k_proj", "wk"),
    "v": ("v_proj", "wv"),
    "qkv": ("qkv_proj", "qkv_linear", "wqkv", "c_attn", "query_key_value", "qkv", "linear_qkv"),
    "o": ("o_proj", "wo", "out_proj", "linear_proj", "dense"),
    "q_norm": ("q_norm", "q_layernorm"),
    "k_norm": ("k_norm", "k_layernorm"),
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "w3"),
    "gate_up": ("gate_up_proj",),
    "down": ("down_proj", "w2"),
    "fc": ("c_fc", "fc1", "fc_in", "dense_h_to_4h", "linear_fc1"),
    "proj": ("fc2", "fc_out", "dense_4h_to_h", "linear_fc2"),
}
"""Last components of module names, by what the module does."""


@dataclass(frozen=True)
class Spot:
    """One place where two models can be compared."""

    role: str
    """`"embedding"`, `"layer 3 attention"` or `"layer 3"`."""
    name: str
    module: nn.Module


@dataclass(frozen=True)
class Layer:
    """One decoder layer."""

    name: str
    module: nn.Module
    parts: dict[str, tuple[str, nn.Module]]
    """By role: the qualified name and the module; roles that it has not are absent."""

    @property
    def attention(self) -> tuple[str, nn.Module] | None:
        """Its attention block, if one of its children is named as one."""
        for name, child in self.module.named_children():
            if name in _ATTENTION:
                return f"{self.name}.{name}", child
        return None


def layers(model: nn.Module) -> list[Layer]:
    """The decoder layers in order; empty where no container of them is found."""
    for path, module in model.named_modules():
        if path.rsplit(".", 1)[-1] in _LAYERS and isinstance(
            module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)
        ):
            children = [(f"{path}.{key}", child) for key, child in module.named_children()]
            return [Layer(name, child, _parts(name, child)) for name, child in children]
    return []


def _parts(where: str, layer: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    known = {name: role for role, names in _PARTS.items() for name in names}
    known["c_proj"] = "c_proj"
    found: dict[str, tuple[str, nn.Module]] = {}
    for path, module in layer.named_modules():
        role = known.get(path.rsplit(".", 1)[-1])
        if role == "c_proj":
            role = "o" if any(part in _ATTENTION for part in path.split(".")) else "proj"
        if role and isinstance(getattr(module, "weight", None), torch.Tensor):
            found.setdefault(role, (f"{where}.{path}", module))
    return found


def embedding(model: nn.Module) -> tuple[str, nn.Module] | None:
    """The token embedding: the one with the most rows."""
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Embedding)]
    found += [
        (n, m)
        for n, m in model.named_modules()
        if type(m).__name__ == "VocabParallelEmbedding" and not isinstance(m, nn.Embedding)
    ]
    return max(found, key=lambda pair: pair[1].weight.shape[0], default=None)  # type: ignore[union-attr,operator]


def head(model: nn.Module) -> tuple[str, nn.Module] | None:
    """The linear layer from the model's width to the vocabulary, which no decoder layer is."""
    tokens = embedding(model)
    if tokens is None:
        return None
    shape = tokens[1].weight.shape  # type: ignore[union-attr]
    inner = {module for layer in layers(model) for module in layer.module.modules()}
    for name, module in model.named_modules():
        if module is tokens[1] or module in inner:
            continue
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.shape == shape:
            return name, module
    return None


def spots(model: nn.Module) -> Iterator[Spot]:
    """What is compared, in the order in which tokens pass."""
    tokens = embedding(model)
    if tokens is not None:
        yield Spot("embedding", *tokens)
    for index, layer in enumerate(layers(model)):
        if layer.attention is not None:
            yield Spot(f"layer {index} attention", *layer.attention)
        yield Spot(f"layer {index}", layer.name, layer.module)
