"""Layers that give a token the same bits in any batch, eager or compiled.

Two things on CPU make a token's result depend on how it was computed:
float32 products take another kernel for few rows, and compiled norms add in
another order than eager ones. Both are taken out here; everything else in a
decoder was measured to agree.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_UNEVEN_ROWS = 12
"""Below this many rows a float32 product on CPU depends on the row count (measured),
unless the count is a multiple of 4."""


def make_exact(model: nn.Module) -> None:
    """Give each `nn.Linear`, `nn.RMSNorm` and `nn.LayerNorm` its exact forward.

    Parameters and names stay. Subclasses with a forward of their own are left alone.
    """
    for module in model.modules():
        for kind, forward in _EXACT.items():
            if isinstance(module, kind) and type(module).forward is kind.forward:
                module.forward = partial(forward, module)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`F.linear` whose rows do not depend on how many there are.

    Args:
        x: `[..., K]`; weight: `[M, K]`; bias: `[M]` or None.

    Returns:
        `[..., M]`.
    """
    rows = x.shape[:-1].numel()
    if rows >= _UNEVEN_ROWS or rows % 4 == 0:
        return F.linear(x, weight, bias)
    padded = F.pad(x.reshape(rows, -1), (0, 0, 0, -rows % 4))
    return F.linear(padded, weight, bias)[:rows].reshape(*x.shape[:-1], -1)


def _linear_forward(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return F.linear(x, module.weight, module.bias)
    if _compiled_serving():
        out: torch.Tensor = torch.ops.vllm_graft.linear(x, module.weight, module.bias)
        return out
    return linear(x, module.weight, module.bias)


def _rms_norm_forward(module: nn.RMSNorm, x: torch.Tensor) -> torch.Tensor:
    if x.device.type == "cpu" and _compiled_serving():
        out: torch.Tensor = torch.ops.vllm_graft.rms_norm(
            x, module.normalized_shape, module.weight, module.eps
        )
        return out
    return F.rms_norm(x, module.normalized_shape, module.weight, module.eps)


def _layer_norm_forward(module: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    if x.device.type == "cpu" and _compiled_serving():
        out: torch.Tensor = torch.ops.vllm_graft.layer_norm(
            x, module.normalized_shape, module.weight, module.bias, module.eps
        )
        return out
    return F.layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)


_EXACT: dict[Any, Callable[..., torch.Tensor]] = {
    nn.Linear: _linear_forward,
    nn.RMSNorm: _rms_norm_forward,
    nn.LayerNorm: _layer_norm_forward,
}


def _compiled_serving() -> bool:
    """Whether this is being traced for inference: then the eager kernel is called as it is."""
    return torch.compiler.is_compiling() and not torch.is_grad_enabled()


# Opaque to the compiler, so that it keeps the eager kernels. No autograd: traced
# only with gradients off.
_LIBRARY = torch.library.Library("vllm_graft", "DEF")
_OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor": (
        linear,
        lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]),
    ),
    "rms_norm(Tensor x, SymInt[] shape, Tensor? weight, float? eps) -> Tensor": (
        F.rms_norm,
        lambda x, shape, weight, eps: torch.empty_like(x),
    ),
    "layer_norm(Tensor x, SymInt[] shape, Tensor? weight, Tensor? bias, float eps) -> Tensor": (
        F.layer_norm,
        lambda x, shape, weight, bias, eps: torch.empty_like(x),
    ),
}
for _schema, (_kernel, _fake) in _OPS.items():
    _LIBRARY.define(_schema)
    _name = _schema.split("(")[0]
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vllm_graft::{_name}", _fake, lib=_LIBRARY)
