"""RMS norms by vLLM's kernel: right, differentiable, the same for a row in any batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.support import relative_error
from vllm_graft import norms
from vllm_graft.exact import make_exact

pytest.importorskip("vllm")


def normed(width, dtype, **options):
    torch.manual_seed(0)
    module = nn.Sequential(nn.RMSNorm(width, dtype=dtype, **options))
    if module[0].weight is not None:
        nn.init.normal_(module[0].weight, mean=1.0)
    make_exact(module)
    return module


@pytest.mark.parametrize("options", [{}, {"eps": 1e-3}, {"elementwise_affine": False}], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_norms_equal_a_float64_reference(grad, options):
    module, x = normed(1024, torch.float32, **options), torch.randn(2, 7, 1024)
    norm = module[0]
    assert norms.takes(norm, x)
    eps = norm.eps or torch.finfo(torch.float32).eps
    weight = None if norm.weight is None else norm.weight.double()
    want = nn.functional.rms_norm(x.double(), (1024,), weight, eps)
    with torch.set_grad_enabled(grad):
        assert relative_error(module(x), want) < 3e-7  # 1,024 squares added in float32


@pytest.mark.parametrize("by_float32", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_norms_are_the_float32_ones_rounded_once(dtype, by_float32, monkeypatch):
    """By the kernel in this dtype, where it rounds so, and where it does not."""
    norms.find_kernel()
    if by_float32:
        monkeypatch.setattr(norms._State, "narrow", ())
    module, x = normed(1024, dtype, eps=1e-6), torch.randn(2, 7, 1024).to(dtype)
    wide = normed(1024, torch.float32, eps=1e-6)
    wide[0].weight.data = module[0].weight.float()
    assert torch.equal(module(x), wide(x.float()).to(dtype))


def test_gradients_equal_a_float64_reference():
    module, x = normed(96, torch.float32), torch.randn(3, 5, 96, requires_grad=True)
    grad, double = torch.randn(3, 5, 96), x.detach().double().requires_grad_()
    weight = module[0].weight.detach().double().requires_grad_()
    module(x).backward(grad)
    eps = torch.finfo(torch.float32).eps
    nn.functional.rms_norm(double, (96,), weight, eps).backward(grad.double())
    assert relative_error(x.grad, double.grad) < 1e-6  # sums of 96 float32 numbers
    assert relative_error(module[0].weight.grad, weight.grad) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_in_any_batch_and_place(dtype):
    module = normed(128, dtype)
    x = torch.randn(40, 2, 256).to(dtype)[
        ..., :128
    ]  # rows that do not touch, as views of a product
    with torch.no_grad():
        whole = module(x)
        assert all(
            torch.equal(module(x[i : i + n]), whole[i : i + n]) for i, n in ((0, 1), (3, 17))
        )
        assert torch.equal(module(x.contiguous()), whole)
    assert torch.equal(module(x).detach(), whole)


@pytest.mark.parametrize("width", [100, (4, 16)], ids=str)
def test_what_the_kernel_does_not_take_is_pytorchs(width):
    shape = (width,) if isinstance(width, int) else width
    module, x = normed(width, torch.float32), torch.randn(3, *shape)
    assert not norms.takes(module[0], x)
    assert torch.equal(module(x), nn.functional.rms_norm(x, shape, module[0].weight, None))
