"""Weights of layers that read the same input, in one storage: views, trainable, laid again."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vllm_graft import exact, products
from vllm_graft.exact import make_exact
from vllm_graft.joined import join_products


class Block(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, n, bias=bias) for n in (32, 16, 16))
        self.o = nn.Linear(32, 32, bias=bias)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(q + torch.cat([k, v], -1))


def joined(block, x):
    """Its groups, after a forward that shows which layers read the same input."""
    make_exact(block)
    with torch.no_grad(), products.watching() as calls:
        block(x)
    return join_products(calls, exact.linear, kept_apart=set(), same=True)


@pytest.fixture(params=[False, True], ids=["plain", "bias"])
def block(request):
    torch.manual_seed(0)
    return Block(request.param)


def serve(block, x):
    with torch.no_grad(), products.serving():
        return block(x)


def lie_together(block):
    weights = (block.q.weight, block.k.weight, block.v.weight)
    return len({weight.untyped_storage().data_ptr() for weight in weights}) == 1


def test_siblings_lie_in_one_storage_and_give_the_same_bits(block):
    x, before = torch.randn(5, 32), copy.deepcopy(block.state_dict())
    make_exact(block)
    want = block(x)
    [group] = joined(block, x)
    assert lie_together(block)
    assert block.o.weight.untyped_storage().nbytes() == block.o.weight.nbytes
    assert torch.equal(serve(block, x), want)
    assert torch.equal(group.multiply(x)[1], block.k(x))
    assert {name: t.tolist() for name, t in block.state_dict().items()} == {
        name: t.tolist() for name, t in before.items()
    }


def test_gradients_and_steps_are_those_of_separate_layers(block):
    x, twin = torch.randn(5, 32), copy.deepcopy(block)
    make_exact(twin)
    [group] = joined(block, x)
    for model in (block, twin):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model(x).square().sum().backward()
        optimizer.step()
    for (name, got), want in zip(block.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(got.grad, want.grad) and torch.equal(got, want), name
    group.refresh()
    assert lie_together(block)
    assert torch.equal(serve(block, x), twin(x))


@pytest.mark.parametrize("move", ["to", "data", "assign", "half and back"])
def test_what_moves_a_parameter_is_laid_together_again(block, move):
    x = torch.randn(5, 32)
    [group] = joined(block, x)
    address = block.q.weight.data_ptr()
    fresh = {name: torch.randn_like(t) for name, t in block.state_dict().items()}
    if move == "assign":
        block.load_state_dict(fresh, assign=True)
    elif move == "data":
        block.k.weight.data = fresh["k.weight"]
    elif move == "to":
        block.to(torch.float64).to(torch.float32)
    else:
        block.half().float()
    want = block(x)
    group.refresh()
    assert torch.equal(serve(block, x), want)
    assert lie_together(block) and block.q.weight.data_ptr() == address


def test_a_copy_is_a_model_of_its_own(block):
    x = torch.randn(5, 32)
    joined(block, x)
    twin = copy.deepcopy(block)
    want = block(x)
    with torch.no_grad():
        twin.q.weight.zero_()
    assert torch.equal(serve(block, x), want) and torch.equal(block(x), want)
    assert not torch.equal(serve(twin, x), want)


def test_the_state_dict_is_saved_as_separate_tensors(block, tmp_path):
    joined(block, torch.randn(5, 32))
    save_file(block.state_dict(), tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in block.state_dict().items())


def test_undone_each_parameter_has_memory_of_its_own(block):
    x = torch.randn(5, 32)
    [group] = joined(block, x)
    want = block(x)
    group.unpack()
    assert block.q.weight.untyped_storage().nbytes() == block.q.weight.nbytes
    assert torch.equal(serve(block, x), want)


def test_layers_that_share_a_weight_or_differ_in_dtype_stay_apart():
    x, block = torch.randn(5, 32), Block()
    make_exact(block)
    with torch.no_grad(), products.watching() as calls:
        block(x)
    tied = {id(block.k.weight), id(block.q.weight)}
    assert join_products(calls, exact.linear, kept_apart=tied, same=True) == []
    block.k.half()
    mixed = join_products(calls, exact.linear, kept_apart=set(), same=True)
    assert mixed == [] and not lie_together(block)


def test_a_product_with_other_bits_is_undone(block):
    def uneven(x, weight, bias):
        return exact.linear(x, weight, bias) * (1 + len(weight))

    x = torch.randn(5, 32)
    make_exact(block)
    with torch.no_grad(), products.watching() as calls:
        block(x)
    assert join_products(calls, uneven, kept_apart=set(), same=True) == []
    assert not lie_together(block)
