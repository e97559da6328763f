"""RMS norms by one kernel, eager and compiled: vLLM's, which knows nothing of other rows.

PyTorch's own is a chain of operations on CPU, which the compiler puts together in another
order of additions. Torch only where vLLM is absent.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

Kernel = Callable[[torch.Tensor, torch.Tensor | None, float], torch.Tensor]
"""`[..., D]`, weight `[D]` of its dtype or None, eps to `[..., D]`; no gradient."""


class _State:
    # Plain attributes: torch.compile traces reads of them.
    kernel: Kernel | None = None
    narrow: tuple[torch.dtype, ...] = ()
    """Dtypes in which the kernel computes in float32 and rounds once."""


def find_kernel() -> None:
    """Look for vLLM's kernel, once; without it norms are PyTorch's."""
    if _State.kernel is None and find_spec("vllm") is not None:
        from vllm_graft.serve import _vllm_cpu

        _State.kernel = kernel = _vllm_cpu.rms_norm_kernel()
        if kernel is not None:
            narrow = (torch.bfloat16, torch.float16)
            _State.narrow = tuple(dtype for dtype in narrow if _rounds_once(kernel, dtype))


def _rounds_once(kernel: Kernel, dtype: torch.dtype) -> bool:
    """Without instructions for bf16 the kernel cuts its numbers off."""
    random = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=random).to(dtype) for shape in ((64, 256), (256,)))
    rounded = kernel(x.float(), weight.float(), 1e-6).to(dtype)
    return torch.equal(kernel(x, weight, 1e-6), rounded)


def takes(module: nn.RMSNorm, x: torch.Tensor) -> bool:
    """Whether the kernel computes `module` on `x`."""
    weight = module.weight
    return (
        _State.kernel is not None
        and x.device.type == "cpu"
        and len(module.normalized_shape) == 1
        and x.shape[-1] % 16 == 0  # whole vectors, as the kernel wants
        and (weight is None or weight.dtype == x.dtype)
    )


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float | None) -> torch.Tensor:
    """`F.rms_norm` over the last dim in float32, rounded once; any shape `[..., D]`.

    Call it where `takes` says so.
    """
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    if torch.is_grad_enabled():
        out: torch.Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
        return out
    return _rms_norm(x, weight, eps)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    assert _State.kernel is not None  # noqa: S101 - `takes` said so
    if x.dtype in _State.narrow:
        return _State.kernel(x.contiguous(), weight, eps)
    wide = None if weight is None else weight.float()
    return _State.kernel(x.float().contiguous(), wide, eps).to(x.dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _rms_norm(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wide, grad_normed = x.float(), grad.float()
        scale = wide.square().mean(-1, keepdim=True).add_(ctx.eps).rsqrt_()
        normed = wide * scale
        grad_weight = None
        if weight is not None:
            rows = tuple(range(x.dim() - 1))
            grad_weight = (grad_normed * normed).sum(rows).to(weight.dtype)
            grad_normed = grad_normed * weight.float()
        along = (grad_normed * normed).mean(-1, keepdim=True)
        return ((grad_normed - normed * along) * scale).to(x.dtype), grad_weight, None


def forward(module: nn.RMSNorm, x: torch.Tensor) -> torch.Tensor:
    """The forward of `module` by the kernel, or by PyTorch where it takes no such input."""
    if takes(module, x):
        return rms_norm(x, module.weight, module.eps)
    return F.rms_norm(x, module.normalized_shape, module.weight, module.eps)
