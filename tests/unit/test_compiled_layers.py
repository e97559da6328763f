"""Compiled layers have the bits of eager ones, for any number of rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vllm_graft import products
from vllm_graft.exact import make_exact

pytestmark = pytest.mark.slow  # seconds of compiling for each


class Block(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.norm, self.last = nn.RMSNorm(256, eps=1e-6), nn.LayerNorm(256)
        self.gate, self.up = nn.Linear(256, 512, bias=bias), nn.Linear(256, 512, bias=bias)
        self.down, self.act = nn.Linear(512, 256, bias=bias), nn.SiLU()

    def forward(self, x):
        h = self.norm(x)
        x = x + self.down(self.act(self.gate(h)) * self.up(h))
        return self.last(x) + self.down(self.up(self.norm(x)))


def compiled_once(model, rows, width, dtype):
    """One graph for any number of rows, its guards ignored from now on, as vLLM does."""
    torch._dynamo.reset()
    options = {
        "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
        # As `_vllm.emulate_eager_rounding` makes them.
        "emulate_precision_casts": True,
        "pattern_matcher": False,
    }
    compiled = torch.compile(model, dynamic=True, options=options)
    x = torch.randn(1, rows, width).to(dtype)
    torch._dynamo.mark_dynamic(x, 1)
    compiled(x)
    return compiled


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_one_graph_has_eager_bits_for_every_number_of_rows(dtype, bias):
    torch.manual_seed(0)
    model = nn.Sequential(Block(bias), Block(bias)).to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.06 if parameter.dim() > 1 else 0.5)
    make_exact(model)
    with torch.no_grad():
        compiled = compiled_once(model, 5, 256, dtype)
        for rows in (1, 2, 3, 4, 7, 8, 11, 12, 13, 40, 129):
            x = torch.randn(1, rows, 256).to(dtype)
            assert torch.equal(compiled(x), model(x)), rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_lone_row_of_many_numbers_has_the_bits_that_it_has_among_others(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4096, 1536)).to(dtype)
    make_exact(model)
    x = torch.randn(1, 16, 4096).to(dtype)
    with torch.no_grad():
        compiled = compiled_once(model, 5, 4096, dtype)
        alone = torch.cat([compiled(x[:, i : i + 1]) for i in range(16)], 1)
    assert torch.equal(alone, model(x))


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_packed_products_in_one_graph_have_the_bits_of_unpacked_ones(dtype, bias):
    pytest.importorskip("vllm")
    from vllm_graft.serve._vllm_packed import CpuPacker

    torch.manual_seed(0)
    model = Block(bias).to(dtype)
    make_exact(model)
    with torch.no_grad():
        with products.watching() as calls:
            model(torch.randn(1, 5, 256).to(dtype))
        for packed in products.pack_products(calls, CpuPacker(exact=True)):
            packed.pack()
        with products.serving():
            compiled = compiled_once(model, 5, 256, dtype)
        for rows in (1, 2, 3, 12, 13, 40, 129):
            x = torch.randn(1, rows, 256).to(dtype)
            with products.serving():
                got = compiled(x)
            assert torch.equal(got, model(x)), rows
