"""Layers that give a token the same bits in any batch, eager or compiled.

Three things on CPU make a token's result depend on how it was computed:
products take another kernel for few rows (float32) or one (bf16), float32 `silu` and `sigmoid`
round the last numbers of each thread's share in another way, and compiled
norms add in another order than eager ones. They are taken out here; everything
else in a decoder was measured to agree.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from vllm_graft import norms
from vllm_graft.products import packed_product

_UNEVEN_ROWS = 12
"""Below this many rows a float32 product on CPU depends on the row count (measured),
unless the count is a multiple of 4. A bf16 product of one row is another than that row's
among others, from about 2,000 inputs on."""


def make_exact(model: nn.Module) -> None:
    """Give each linear layer, norm, `nn.SiLU` and `nn.Sigmoid` its exact forward.

    Engines do so with the models that they serve. A trainer in another process does it to
    compute the engine's bits.

    Args:
        model: attention replaced; before `fully_shard`, compilation and the like.

    Parameters and names stay. Modules with a forward of their own are left alone.
    """
    norms.find_kernel()
    _give_forwards(model, _EXACT)


def take_products(model: nn.Module) -> None:
    """Only let linear layers serve by packed copies of their weights."""
    _give_forwards(model, {nn.Linear: _linear_forward})


def _give_forwards(model: nn.Module, forwards: dict[Any, Callable[..., torch.Tensor]]) -> None:
    for module in model.modules():
        for kind, forward in forwards.items():
            own = "forward" in vars(module) or not isinstance(module, kind)
            if not own and type(module).forward is kind.forward:
                module.forward = partial(forward, module)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`F.linear` whose rows do not depend on how many there are.

    Args:
        x: `[..., K]`; weight: `[M, K]`; bias: `[M]` or None.

    Returns:
        `[..., M]`.
    """
    if x.device.type == "cpu" and compiled_serving():
        return _traced_linear(x, weight, bias)
    if torch.is_grad_enabled() and _slow_backward(x):
        trained: torch.Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return trained
    return _linear(x, weight, bias)


def _slow_backward(x: torch.Tensor) -> bool:
    """Whether PyTorch has no bf16 kernel for gradients here, but one 20 times slower."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not _multiplies_bf16()


@functools.cache
def _multiplies_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _Linear(torch.autograd.Function):
    """`_linear`, with gradients by float32 products that are rounded once."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wide = grad.float().flatten(0, -2)
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            (wide @ weight.float()).view(x.shape).to(x.dtype) if of_x else None,
            (wide.t() @ x.float().flatten(0, -2)).to(weight.dtype) if of_weight else None,
            wide.sum(0).to(grad.dtype) if of_bias else None,
        )


def _traced_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """`_linear` without a branch on the number of rows: one graph serves them all.

    Such a graph believes that there are two rows at least, so a lone one is not asked for
    but follows from the remainder.
    """
    rows = x.shape[:-1].numel()
    missing = -rows % (4 if x.dtype == torch.float32 else 2)
    padded = F.pad(x.reshape(rows, -1), (0, 0, 0, missing))
    return F.linear(padded, weight, bias)[:rows].reshape(*x.shape[:-1], -1)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    rows = x.shape[:-1].numel()
    missing = _missing_rows(x, rows)
    if not missing:
        return F.linear(x, weight, bias)
    padded = F.pad(x.reshape(rows, -1), (0, 0, 0, missing))
    return F.linear(padded, weight, bias)[:rows].reshape(*x.shape[:-1], -1)


def _missing_rows(x: torch.Tensor, rows: int) -> int:
    """Rows to add to `rows` of `x` for a product that gives each the same bits in any batch."""
    if x.device.type != "cpu" or rows >= _UNEVEN_ROWS:
        return 0
    return -rows % 4 if x.dtype == torch.float32 else int(rows == 1)


def silu(x: torch.Tensor) -> torch.Tensor:
    """`F.silu` whose numbers do not depend on where they lie in `x`, of any shape."""
    if not _float32_on_cpu(x):
        return F.silu(x)
    if compiled_serving():
        out: torch.Tensor = torch.ops.vllm_graft.silu(x)
        return out
    exact: torch.Tensor = _Silu.apply(x)  # type: ignore[no-untyped-call]
    return exact


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """`torch.sigmoid` whose numbers do not depend on where they lie in `x`, of any shape."""
    if not _float32_on_cpu(x):
        return torch.sigmoid(x)
    if compiled_serving():
        out: torch.Tensor = torch.ops.vllm_graft.sigmoid(x)
        return out
    exact: torch.Tensor = _Sigmoid.apply(x)  # type: ignore[no-untyped-call]
    return exact


# `exp` and the basic operations round every number alike, unlike the fused kernels. In
# bf16 and fp16 the fused kernels do too (tried on all 65,536 numbers).
def _silu(x: torch.Tensor) -> torch.Tensor:
    return x / torch.exp(-x).add_(1)


def _sigmoid(x: torch.Tensor) -> torch.Tensor:
    return torch.exp(-x).add_(1).reciprocal_()


class _Silu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return _silu(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.aten.silu_backward(grad, *ctx.saved_tensors)
        return out


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        out = _sigmoid(x)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.aten.sigmoid_backward(grad, *ctx.saved_tensors)
        return out


def heads_product(x_TNK: torch.Tensor, weight_NKM: torch.Tensor) -> torch.Tensor:
    """One product per head, `[T, N, M]`, whose rows do not depend on how many there are."""
    rows = x_TNK.shape[0]
    padded = F.pad(x_TNK, (0, 0, 0, 0, 0, _missing_rows(x_TNK, rows)))
    return torch.bmm(padded.transpose(0, 1), weight_NKM).transpose(0, 1)[:rows]


def product(module: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`linear` by the weight of `module`, or by its packed copy while the engine serves."""
    packed = packed_product(module, x, bias)
    return linear(x, module.weight, bias) if packed is None else packed


def _linear_forward(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return product(module, x, module.bias)


def _rms_norm_forward(module: nn.RMSNorm, x: torch.Tensor) -> torch.Tensor:
    if x.device.type == "cpu" and compiled_serving() and not norms.takes(module, x):
        out: torch.Tensor = torch.ops.vllm_graft.rms_norm(
            x, module.normalized_shape, module.weight, module.eps
        )
        return out
    return norms.forward(module, x)


def _layer_norm_forward(module: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    if x.device.type == "cpu" and compiled_serving():
        out: torch.Tensor = torch.ops.vllm_graft.layer_norm(
            x, module.normalized_shape, module.weight, module.bias, module.eps
        )
        return out
    return F.layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)


def _silu_forward(module: nn.SiLU, x: torch.Tensor) -> torch.Tensor:
    return silu(x)


def _sigmoid_forward(module: nn.Sigmoid, x: torch.Tensor) -> torch.Tensor:
    return sigmoid(x)


_EXACT: dict[Any, Callable[..., torch.Tensor]] = {
    nn.Linear: _linear_forward,
    nn.RMSNorm: _rms_norm_forward,
    nn.LayerNorm: _layer_norm_forward,
    nn.SiLU: _silu_forward,
    nn.Sigmoid: _sigmoid_forward,
}


def _float32_on_cpu(x: torch.Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu"


def compiled_serving() -> bool:
    """Whether this is being traced for inference: then the eager kernel is called as it is."""
    return torch.compiler.is_compiling() and not torch.is_grad_enabled()


_LIBRARY = torch.library.Library("vllm_graft", "DEF")


def define_op(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Make `torch.ops.vllm_graft.NAME`, opaque to the compiler so that it keeps eager kernels.

    It has no autograd: call it only where `compiled_serving()`.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vllm_graft::{name}", fake, lib=_LIBRARY)


define_op("silu(Tensor x) -> Tensor", _silu, torch.empty_like)
define_op("sigmoid(Tensor x) -> Tensor", _sigmoid, torch.empty_like)
define_op(
    "rms_norm(Tensor x, SymInt[] shape, Tensor? weight, float? eps) -> Tensor",
    F.rms_norm,
    lambda x, shape, weight, eps: torch.empty_like(x),
)
define_op(
    "layer_norm(Tensor x, SymInt[] shape, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    F.layer_norm,
    lambda x, shape, weight, bias, eps: torch.empty_like(x),
)
