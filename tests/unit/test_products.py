"""Packed products: grouped by input, packed anew when weights change, released and restored."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from vllm_graft import exact, products
from vllm_graft.exact import make_exact
from vllm_graft.serve.packing import Packing


@dataclass
class Copied:
    weight: torch.Tensor
    number: int

    @property
    def handle(self):
        return torch.tensor([self.number])


class CopyingPacker:
    """Keeps clones, so that a product tells which weights it was packed from."""

    def __init__(self):
        self.kernels = {}
        self.products = 0

    def kernel(self, weights):
        return self

    def pack(self, weights):
        kernel = Copied(torch.cat(weights), len(self.kernels) + 1)
        self.kernels[kernel.number] = kernel
        return kernel

    def unpack(self, copy, like):
        return copy.weight.split([len(weight) for weight in like])

    def multiply(self, x, bias, handle, outputs, counts=None):
        self.products += 1
        weight = self.kernels[int(handle)].weight
        return exact.linear(x, weight, bias).split(outputs, -1)


class Block(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, n, bias=bias) for n in (8, 4, 4))
        self.o = nn.Linear(8, 8, bias=bias)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(q + torch.cat([k, v], -1))


@pytest.fixture(params=[False, True], ids=["plain", "bias"])
def packed_block(request):
    torch.manual_seed(0)
    # Whole numbers have one sum, however they are added: that is not what is tested here.
    block, packer, x = Block(request.param), CopyingPacker(), torch.randint(-9, 9, (3, 8)).float()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randint(-9, 9, parameter.shape))
    make_exact(block)
    with torch.no_grad(), products.watching() as calls:
        block(x)
    groups = products.pack_products(calls, packer)
    for group in groups:
        group.pack()
    return block, packer, groups, x


def serve(block, x):
    with torch.no_grad(), products.serving():
        return block(x)


def test_layers_of_one_input_share_a_product(packed_block):
    block, packer, groups, x = packed_block
    want = block(x)
    assert [len(group._members) for group in groups] == [3, 1]
    assert torch.equal(serve(block, x), want)
    assert packer.products == 2
    assert groups[0]._input is None


def test_training_multiplies_by_the_parameters(packed_block):
    block, packer, _, x = packed_block
    block(x).sum().backward()
    with products.serving():
        block(x).sum().backward()
    with torch.no_grad():
        block(x)
    assert packer.products == 0
    assert block.q.weight.grad is not None


def test_an_in_place_change_is_packed_anew(packed_block):
    block, _, groups, x = packed_block
    old = serve(block, x)
    with torch.no_grad():
        block.k.weight.mul_(2)
    assert torch.equal(serve(block, x), old)
    for group in groups:
        group.refresh()
    assert torch.equal(serve(block, x), block(x))
    assert not torch.equal(serve(block, x), old)


def test_an_exchanged_parameter_is_packed_anew(packed_block):
    block, _, groups, x = packed_block
    block.v.weight = nn.Parameter(torch.ones(4, 8))
    for group in groups:
        group.refresh()
    assert torch.equal(serve(block, x), block(x))


def test_released_weights_come_back_as_they_were(packed_block):
    block, _, groups, x = packed_block
    before, want = copy.deepcopy(block.state_dict()), serve(block, x)
    for group in groups:
        group.release()
        group.refresh()
    assert block.q.weight.untyped_storage().nbytes() == 4
    assert block.q.weight.shape == (8, 8) and block.q.weight.isnan().all()
    assert torch.equal(serve(block, x), want)
    with pytest.raises(RuntimeError):
        block.q.weight.detach().copy_(torch.ones(8, 8))
    products.restore_weights(block)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_a_training_forward_brings_released_weights_back(packed_block):
    block, _, groups, x = packed_block
    want = block(x)
    for group in groups:
        group.release()
    assert torch.equal(block(x), want)


def test_copies_of_the_model_multiply_by_their_own_weights(packed_block):
    block, _, _, x = packed_block
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        with torch.no_grad():
            twin.q.weight.zero_()
        assert not torch.equal(serve(twin, x), serve(block, x))
        assert torch.equal(serve(twin, x), twin(x))


def test_unpacking_undoes_it_all(packed_block):
    block, packer, groups, x = packed_block
    for group in groups:
        group.release()
        group.unpack()
    before = packer.products
    assert torch.equal(serve(block, x), block(x))
    assert packer.products == before


@pytest.fixture
def packing(packed_block):
    """What looks at all groups of a model before a step."""
    block, packer, groups, _ = packed_block
    made = Packing(block, packer, join=False, same=True, release=False)
    made._packed = groups
    made.refresh()
    return made


def test_a_step_after_a_change_packs_that_group_only(packed_block, packing):
    block, packer, _, x = packed_block
    made = len(packer.kernels)
    packing.refresh()
    assert len(packer.kernels) == made
    for change in (lambda p: p.mul_(2), lambda p: setattr(p, "data", p.detach() + 1)):
        with torch.no_grad():
            change(block.v.weight)
        packing.refresh()
        assert torch.equal(serve(block, x), block(x))
    assert len(packer.kernels) == made + 2


def test_released_weights_are_looked_at_again_once_they_are_restored(packed_block, packing):
    block, _, groups, x = packed_block
    for group in groups:
        group.release()
    packing.refresh()
    products.restore_weights(block)
    packing.refresh()
    with torch.no_grad():
        block.o.weight.add_(1)
    packing.refresh()
    assert torch.equal(serve(block, x), block(x))


def test_weights_packed_meanwhile_and_put_back_are_packed_again(packed_block, packing):
    block, _, _, x = packed_block
    first, other = block.o.weight.data, torch.ones(8, 8)
    block.o.weight.data = other
    packing.changed()
    block.o.weight.data = first
    packing.refresh()
    assert torch.equal(serve(block, x), block(x))
