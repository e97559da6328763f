"""Layers that give a token the same bits in any batch, eager or compiled.

Three things make a token's result depend on how it was computed. On CPU products add in an
order that they choose by the number of rows (`tiles.py`), and float32 `silu` and `sigmoid`
round the last numbers of each thread's share in another way; on cards vLLM's batch-invariant
mode takes care of products. Everywhere compiled norms add in another order than eager ones.
They are taken out here; everything else in a decoder was measured to agree.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from vllm_graft import norms
from vllm_graft.products import packed_product
from vllm_graft.tiles import (
    Product,
    Rows,
    aligned,
    by_rows,
    cancelling,
    linear_rows,
    trial_rows,
    try_rows,
)


def make_exact(model: nn.Module) -> None:
    """Give each linear layer, norm, `nn.SiLU` and `nn.Sigmoid` its exact forward.

    Engines do so with the models that they serve. A trainer in another process does it to
    compute the engine's bits.

    Args:
        model: attention replaced; before `fully_shard`, compilation and the like. Where it is
            on a card, vLLM's batch-invariant products are switched on for this process if
            `VLLM_BATCH_INVARIANT=1` was in the environment; without it nothing is exact there.

    Parameters and names stay. Modules with a forward of their own are left alone.
    """
    norms.find_kernel()
    if find_spec("vllm") and any(p.device.type == "cuda" for p in model.parameters()):
        from vllm_graft.serve import _vllm_cuda

        _vllm_cuda.switch_on_batch_invariance()
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


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear` whose rows do not depend on how many there are.

    Args:
        x: `[..., K]`; weight: `[M, K]`; bias: `[M]` or None.

    Returns:
        `[..., M]`.
    """
    if x.device.type != "cpu":
        return _multiply_wide(x, weight, bias) if _wide(x) else _multiply(x, weight, bias)
    if torch.is_autocast_enabled("cpu"):
        x, weight, bias = _autocast(x), _autocast(weight), None if bias is None else _autocast(bias)
    if compiled_serving():
        return _traced_linear(x, weight, bias)
    plain = allowed_rows(x, weight).whole(x.shape[:-1].numel())
    if torch.is_grad_enabled() and (_slow_backward(x) or not plain):
        trained: torch.Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return trained
    return _linear(x, weight, bias)


MANY_ROWS = 32
"""On cards up to 16 float32 rows are added up in another order than more."""


def _wide(x: torch.Tensor) -> bool:
    return x.dtype == torch.float32 and not _is_sharded(x)


def _multiply_wide(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """With `MANY_ROWS` of zeros more, always: compiled code must not ask how many there are."""
    flat = x.flatten(0, -2)
    out = _multiply(F.pad(flat, (0, 0, 0, MANY_ROWS)), weight, bias)
    return out[: flat.shape[0]].view(*x.shape[:-1], -1)


def _autocast(x: torch.Tensor) -> torch.Tensor:
    """As autocast gives it to a product; here, since the kernel is chosen by the dtype."""
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype("cpu"))


def _slow_backward(x: torch.Tensor) -> bool:
    """Whether PyTorch has no bf16 kernel for gradients here, but one 20 times slower."""
    return x.dtype == torch.bfloat16 and not _multiplies_bf16()


@functools.cache
def _multiplies_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _Linear(torch.autograd.Function):
    """`_linear`, with gradients by one product each, in float32 where bf16 would be slow."""

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
        dtype = torch.float32 if _slow_backward(x) else x.dtype
        rows = grad.to(dtype).flatten(0, -2)
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            (rows @ weight.to(dtype)).view(x.shape).to(x.dtype) if of_x else None,
            (rows.t() @ x.to(dtype).flatten(0, -2)).to(weight.dtype) if of_weight else None,
            rows.sum(0).to(grad.dtype) if of_bias else None,
        )


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    allowed = allowed_rows(x, weight)
    if allowed.whole(x.shape[:-1].numel()):
        return _multiply(aligned(x), weight, bias)
    flat = by_rows(lambda part: _multiply(part, weight, bias), x.flatten(0, -2), allowed)
    # No view: a model may add in place to what its layer gave, which autograd allows for a whole.
    shaped: torch.Tensor = torch.ops.aten._unsafe_view(flat, [*x.shape[:-1], flat.shape[-1]])
    return shaped


def _multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if _is_sharded(weight) and torch.is_inference_mode_enabled():
        # There DTensor plans the product as a whole, and by its sizes: the bias is added
        # before or after the sum over ranks. Outside, as in training, each rank multiplies what
        # it holds. DTensors make no views from one mode to the other, so what comes out is copied.
        rows = x.flatten(0, -2)
        with torch.inference_mode(False), torch.no_grad():
            flat = F.linear(rows, weight, bias)
        return flat.clone().view(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


def _is_sharded(weight: torch.Tensor) -> bool:
    return hasattr(weight, "to_local")


def allowed_rows(x: torch.Tensor, weight: torch.Tensor) -> Rows:
    """By how many rows of `x` to multiply."""
    # A DTensor multiplies by its shard.
    held: Any = weight.to_local() if _is_sharded(weight) else weight  # type: ignore[attr-defined]
    outputs, inputs = held.shape
    return _rows(outputs, inputs, x.dtype, _lies_transposed(held))


def _rows(outputs: int, inputs: int, dtype: torch.dtype, transposed: bool) -> Rows:
    by = by_transposed if transposed else by_weight
    return linear_rows(by, outputs, inputs, dtype, torch.get_num_threads())


def _lies_transposed(weight: torch.Tensor) -> bool:
    return weight.stride(0) < weight.stride(1)


def by_weight(weight: torch.Tensor) -> Product:
    """`F.linear`."""
    return lambda x: F.linear(x, weight)


def by_transposed(weight: torch.Tensor) -> Product:
    """`F.linear` by a weight that lies in memory as `[K, M]`: kernels may add in another order."""
    return by_weight(weight.t().contiguous().t())


def _traced_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """`_linear` in one graph for all numbers of rows: traced where its kernel allows."""
    step = _traced_step(*weight.shape, x.dtype, _lies_transposed(weight))
    if step is None:
        out: torch.Tensor = torch.ops.vllm_graft.linear(x, weight, bias)
        return out
    rows = math.prod(x.shape[:-1])
    # Such a graph believes that there are two rows at least, so a lone one is not asked for
    # but follows from the remainder.
    padded = F.pad(x.reshape(rows, -1), (0, 0, 0, -rows % step))
    return F.linear(padded, weight, bias)[:rows].reshape(*x.shape[:-1], -1)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _traced_step(outputs: int, inputs: int, dtype: torch.dtype, transposed: bool) -> int | None:
    return _rows(outputs, inputs, dtype, transposed).step


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
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        sigmoid = _sigmoid(x)
        slope: torch.Tensor = sigmoid * (1 + x * (1 - sigmoid))
        return grad * slope


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
    if x_TNK.device.type != "cpu":
        return _by_heads(weight_NKM)(x_TNK)
    allowed = _heads_rows(*weight_NKM.shape, x_TNK.dtype, torch.get_num_threads())
    return by_rows(_by_heads(weight_NKM), x_TNK, allowed)


def _by_heads(weight_NKM: torch.Tensor) -> Product:
    return lambda x_TNK: torch.bmm(x_TNK.transpose(0, 1), weight_NKM).transpose(0, 1)


@functools.cache
def _heads_rows(heads: int, inputs: int, outputs: int, dtype: torch.dtype, threads: int) -> Rows:
    with torch.inference_mode(False), torch.no_grad():
        weight = cancelling((heads, outputs, inputs), dtype, seed=0).transpose(1, 2)
        x = cancelling((trial_rows(heads * outputs), heads, inputs), dtype, seed=1)
        return try_rows(_by_heads(weight), x)


def product(module: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`linear` by the weight of `module`, or by its packed copy while the engine serves."""
    packed = packed_product(module, x, bias)
    return linear(x, module.weight, bias) if packed is None else packed


def _linear_forward(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return product(module, x, module.bias)


def _rms_norm_forward(module: nn.RMSNorm, x: torch.Tensor) -> torch.Tensor:
    if compiled_serving() and not norms.takes(module, x):
        out: torch.Tensor = torch.ops.vllm_graft.rms_norm(
            x, module.normalized_shape, module.weight, module.eps
        )
        return out
    return norms.forward(module, x)


def _layer_norm_forward(module: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    if compiled_serving():
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


class _State:
    # A plain attribute: torch.compile traces reads of it.
    recording = False


@contextmanager
def recording() -> Iterator[None]:
    """Choose operations for a graph in the block (`serve.recording` makes one)."""
    _State.recording = True
    try:
        yield
    finally:
        _State.recording = False


def is_recorded() -> bool:
    """Whether a graph is being recorded."""
    return _State.recording


def compiled_serving() -> bool:
    """Whether this is being traced for inference: then the eager kernel is called as it is."""
    traced = _State.recording or torch.compiler.is_compiling()
    return traced and not torch.is_grad_enabled()


_LIBRARY = torch.library.Library("vllm_graft", "DEF")


def define_op(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Make `torch.ops.vllm_graft.NAME`, opaque to the compiler so that it keeps eager kernels.

    It has no autograd: call it only where `compiled_serving()`.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    fake_op(name, fake)


def fake_op(name: str, fake: Callable[..., Any]) -> None:
    """Tell the compiler what `torch.ops.vllm_graft.NAME` gives."""
    torch.library.register_fake(f"vllm_graft::{name}", fake, lib=_LIBRARY)


define_op(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _linear,
    lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]),
)
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
