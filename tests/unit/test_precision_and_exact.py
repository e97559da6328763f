"""Building and casting without ruining tables; layers whose rows do not depend on the batch."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vllm_graft import exact
from vllm_graft.exact import make_exact
from vllm_graft.precision import keep_table_precision, parameters_as
from vllm_graft.serve import _vllm
from vllm_graft.train.options import engine_options


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        weight = nn.Parameter(torch.ones(3))
        self.weight = weight
        nn.init.constant_(weight, 2.0)  # the same object, also after registration
        self.linear = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.register_buffer("freqs_cis", 1.0 / 10000 ** (torch.arange(0, 8, 2) / 8))
        self.register_buffer("other", torch.ones(2))


def test_parameters_get_the_dtype_and_tables_stay_float32():
    with parameters_as(torch.bfloat16):
        net = Net()
        assert torch.get_default_dtype() == torch.float32
    assert {net.weight.dtype, net.linear.weight.dtype} == {torch.bfloat16}
    assert net.scale.dtype == torch.float64
    assert net.weight.tolist() == [2.0, 2.0, 2.0]
    assert torch.equal(net.freqs_cis, Net().freqs_cis)
    assert Net().weight.dtype == torch.float32


def test_it_is_undone_when_building_fails():
    register = nn.Module.register_parameter
    with pytest.raises(RuntimeError), parameters_as(torch.bfloat16):
        raise RuntimeError
    assert nn.Module.register_parameter is register
    assert torch.get_default_dtype() == torch.float32


def test_kept_tables_survive_casts_copies_and_empty_moves():
    net = Net()
    table = net.freqs_cis.clone()
    keep_table_precision(net, {net: {"other"}})
    for moved in (net.half(), copy.deepcopy(net).bfloat16(), net.to_empty(device="cpu")):
        assert torch.equal(moved.freqs_cis, table) and moved.other.dtype == torch.float32
    assert set(net.state_dict()) == set(Net().state_dict())
    assert net.to("meta").freqs_cis.is_meta


def test_a_copy_protects_its_own_tables():
    net = Net()
    keep_table_precision(net, {})
    twin = copy.deepcopy(net)
    twin.freqs_cis.zero_()
    twin.bfloat16()
    assert not twin.freqs_cis.any() and net.freqs_cis.any()
    assert net.weight.dtype == torch.float32


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 64])
def test_float32_products_do_not_depend_on_the_number_of_rows(rows):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(256, 96))
    make_exact(layer)
    x = torch.randn(64, 256)
    assert torch.equal(layer(x[:rows]), layer(x)[:rows])
    assert torch.equal(layer(x[:rows].view(1, rows, 256))[0], layer(x)[:rows])


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 64])
def test_a_weight_that_lies_transposed_is_tried_as_it_lies(rows):
    torch.manual_seed(0)
    x, weights = torch.randn(64, 256), [torch.randn(256, size).t() for size in (4, 96)]
    for weight in weights:
        assert torch.equal(exact.linear(x[:rows], weight), exact.linear(x, weight)[:rows])


def test_a_lone_bf16_row_has_the_bits_that_it_has_among_others():
    torch.manual_seed(0)
    layer, x = nn.Linear(4096, 1536).bfloat16(), torch.randn(64, 4096).bfloat16()
    make_exact(layer)
    with torch.no_grad():
        assert torch.equal(torch.cat([layer(row[None]) for row in x]), layer(x))


def test_exact_layers_differentiate():
    layer = nn.Linear(8, 5)
    plain = copy.deepcopy(layer)
    make_exact(layer)
    x = torch.randn(3, 8, requires_grad=True)
    for module in (plain, layer):
        module(x).square().sum().backward()
    assert torch.allclose(layer.weight.grad, plain.weight.grad, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 48), (3, 48), (2, 7, 48)])
def test_bf16_gradients_where_the_processor_has_no_bf16(shape, monkeypatch):
    """The forward keeps its bits; gradients are those of float64, rounded once."""
    monkeypatch.setattr(exact, "_multiplies_bf16", lambda: False)
    torch.manual_seed(0)
    layer = nn.Linear(48, 20).bfloat16()
    wide = copy.deepcopy(layer).double()
    x = torch.randn(shape).bfloat16().requires_grad_()
    x_wide, grad = x.detach().double().requires_grad_(), torch.randn(*shape[:-1], 20).bfloat16()
    make_exact(layer)
    out = layer(x)
    with torch.no_grad():
        assert torch.equal(out, layer(x))
    out.backward(grad)
    wide(x_wide).backward(grad.double())
    # Half a unit in the last of bf16's 8 bits, and the float32 sums before it.
    close = {"rtol": 2**-8, "atol": 1e-5}
    for got, want in ((x, x_wide), *zip(layer.parameters(), wide.parameters(), strict=True)):
        assert got.grad.dtype == torch.bfloat16
        torch.testing.assert_close(got.grad.double(), want.grad, **close)


def test_a_layer_with_a_forward_of_its_own_is_left_alone():
    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer = Twice(4, 4)
    make_exact(layer)
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("name", ["rope_table", "freqs_cos", "cos_cached", "inv_freq", "sin"])
def test_real_tables_are_known_by_name(name):
    net = nn.Linear(2, 2)
    net.register_buffer(name, torch.rand(4))
    net.register_buffer("single", torch.rand(4))  # has "sin" in it, is no table
    keep_table_precision(net, {})
    net.bfloat16()
    assert getattr(net, name).dtype == torch.float32 and net.single.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [nn.SiLU, nn.Sigmoid])
def test_activations_do_not_depend_on_where_a_number_lies(kind):
    """In float32 their fused kernels round the end of each thread's share in another way."""
    torch.manual_seed(0)
    plain, x = kind(), torch.randn(375, 97)
    exact = nn.Sequential(kind())
    make_exact(exact)
    rows = [slice(n, n + 3) for n in range(0, 375, 3)]
    assert all(torch.equal(exact(x[r]), exact(x)[r]) for r in rows)
    assert not all(torch.equal(plain(x[r]), plain(x)[r]) for r in rows)


def test_float32_products_on_a_card_have_many_rows(monkeypatch):
    """Kernels there add up to 16 rows in another order than more."""
    rows, multiply = [], exact._multiply
    monkeypatch.setattr(
        exact, "_multiply", lambda x, *rest: rows.append(len(x)) or multiply(x, *rest)
    )
    weight, bias = torch.randn(3, 5), torch.randn(3)
    x = torch.randn(2, 4, 5, requires_grad=True)
    out = exact._multiply_wide(x, weight, bias)
    want = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(out, want)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (out, want)]
    torch.testing.assert_close(*grads)
    assert rows == [8 + exact.MANY_ROWS]
    on_card = torch.empty(2, 4, 5, device="meta")
    assert exact.linear(on_card, weight.to("meta")).shape == (2, 4, 3)
    assert exact.linear(on_card.bfloat16(), weight.to("meta").bfloat16()).shape == (2, 4, 3)
    assert rows[1:] == [8 + exact.MANY_ROWS, 2]


def test_a_card_is_exact_only_in_batch_invariant_mode(monkeypatch):
    monkeypatch.setattr(_vllm, "platform_device", lambda: "cuda")
    config = SimpleNamespace(additional_config={})
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "0")
    assert not _vllm.serves_exactly(config)
    with pytest.raises(ValueError, match=r"VLLM_BATCH_INVARIANT=1.*exact=False"):
        engine_options(None, "Some", True, {})
    assert engine_options(None, "Some", False, {})["hf_overrides"] == {"architectures": ["Some"]}
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert _vllm.serves_exactly(config)
    engine_options(None, "Some", True, {})
