"""TorchTitan's mixture of experts as Graft runs it: any dtype, any batch, differentiable."""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support import python, relative_error
from vllm_graft import exact, products, record_routing
from vllm_graft.experts import by_expert
from vllm_graft.families.torchtitan_moe import correct_feed_forward
from vllm_graft.precision import keep_table_precision, parameters_as

DIM, HIDDEN, EXPERTS, TOP_K = 96, 48, 8, 3
ROUTING = {
    "deepseek": {
        "score_func": "sigmoid", "route_norm": True, "route_scale": 2.5,
        "num_expert_groups": 4, "num_limited_groups": 2,
    },
    "qwen": {"score_func": "softmax", "route_norm": True},
    "plain": {"score_func": "softmax"},
}  # fmt: skip


def titan_moe(routing="deepseek", seed=0, **overrides):
    """TorchTitan's `MoE` with one shared expert and a router bias, as it comes."""
    from torchtitan.models.common.config_utils import (
        make_ffn_config,
        make_moe_config,
        make_routed_experts_config,
        make_router_config,
    )

    sizes = {"dim": DIM, "num_experts": EXPERTS, "top_k": TOP_K} | overrides
    init = partial(nn.init.normal_, std=0.2)
    moe = make_moe_config(
        num_experts=sizes["num_experts"],
        router=make_router_config(**sizes, gate_param_init={"weight": init}, **ROUTING[routing]),
        routed_experts=make_routed_experts_config(
            **sizes, hidden_dim=HIDDEN, comm_backend="standard",
            param_init={"w1_EFD": init, "w2_EDF": init, "w3_EFD": init},
        ),
        shared_experts=make_ffn_config(
            dim=DIM, hidden_dim=HIDDEN, w1_param_init={"weight": init},
            w2w3_param_init={"weight": init},
        ),
    ).build()  # fmt: skip
    torch.manual_seed(seed)
    for parameter in moe.parameters():
        init(parameter)
    moe.expert_bias_E.normal_(std=0.3)
    return moe


def corrected(dtype=torch.float32, **options):
    """The model after what `replace_with_trainable_attention` and the adapter do to it."""
    moe = titan_moe(**options)
    correct_feed_forward(moe)
    keep_table_precision(moe, {})
    exact.make_exact(moe)
    return moe.to(dtype)


def reference(moe, x_TD):
    """The layer written out in float64, with gradients."""
    w = {name: p.detach().double().requires_grad_() for name, p in moe.named_parameters()}
    x = x_TD.detach().double().requires_grad_()
    scores = torch.sigmoid(x @ w["router.gate.weight"].T)
    choice = (scores + moe.expert_bias_E).unflatten(-1, (4, 2))
    best = choice.topk(2).values.sum(-1).topk(2).indices
    open_ = torch.zeros(len(x), 4).scatter(1, best, 1.0).bool()[..., None].expand_as(choice)
    ids = torch.where(open_, choice, float("-inf")).flatten(1).topk(TOP_K).indices
    chosen = scores.gather(1, ids)
    chosen = 2.5 * chosen / chosen.sum(1, keepdim=True)
    rows = []
    for token, experts, weights in zip(x, ids.tolist(), chosen, strict=True):
        row = swiglu(token, *(w[f"shared_experts.w{i}.weight"] for i in (1, 2, 3)))
        for expert, weight in zip(experts, weights, strict=True):
            names = ("w1_EFD", "w2_EDF", "w3_EFD")
            stacks = [w[f"routed_experts.inner_experts.{name}"][expert] for name in names]
            row = row + weight * swiglu(token, *stacks)
        rows.append(row)
    return torch.stack(rows), x, w


def swiglu(x, w1, w2, w3):
    return w2 @ (F.silu(w1 @ x) * (w3 @ x))


def test_values_and_gradients_are_those_of_float64():
    moe, x = corrected(), torch.randn(40, DIM, requires_grad=True)
    want, x64, w64 = reference(moe, x)
    got = moe(x[None])[0]
    weight = torch.randn(40, DIM)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    # fp32, sums over at most 96 terms.
    assert relative_error(got, want) < 2e-6
    assert relative_error(x.grad, x64.grad) < 2e-6
    for name, parameter in moe.named_parameters():
        assert relative_error(parameter.grad, w64[name].grad) < 5e-6, name


def test_experts_without_tokens_get_gradients_of_zero():
    moe = corrected()
    moe(torch.randn(1, 1, DIM)).sum().backward()
    per_expert = moe.routed_experts.inner_experts.w1_EFD.grad.abs().amax((1, 2))
    assert int((per_expert > 0).sum()) == TOP_K and int((per_expert == 0).sum()) == 5


def test_experts_get_gradients_of_zero_when_no_token_chose_any():
    stacks = corrected().routed_experts.inner_experts
    stacks(torch.empty(0, DIM), torch.zeros(8, dtype=torch.int64)).sum().backward()
    assert all(not parameter.grad.any() for parameter in stacks.parameters())


def test_the_uncorrected_experts_are_wrong_in_float32():
    """Fails when TorchTitan computes experts in their own dtype; the correction can then go."""
    x = torch.randn(40, DIM)
    want, _, _ = reference(titan_moe(), x)
    assert relative_error(titan_moe()(x[None])[0], want) > 1e-3


@pytest.mark.parametrize("routing", ROUTING)
def test_routing_is_that_of_torchtitan(routing):
    theirs, ours = titan_moe(routing), corrected(routing=routing)
    x = torch.randn(2, 50, DIM)
    for want, got in zip(
        theirs.router(x, theirs.expert_bias_E), ours.router(x, ours.expert_bias_E), strict=True
    ):
        assert torch.allclose(got.float(), want.float(), rtol=1e-5)


@pytest.mark.parametrize("routing", ROUTING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_token_gets_the_same_bits_alone_and_in_any_batch(dtype, routing):
    moe = corrected(dtype, routing=routing)
    x = torch.randn(70, DIM).to(dtype)
    with record_routing(moe) as whole:
        want = moe(x[None])[0]
    generator = torch.Generator().manual_seed(3)
    for rows in range(1, 71):
        order = torch.randperm(70, generator=generator)[:rows]
        with record_routing(moe) as part:
            got = moe(x[order][None])[0]
        assert torch.equal(got, want[order]), rows
        assert torch.equal(part["router"], whole["router"][order]), rows
    for token in range(70):
        assert torch.equal(moe(x[token].view(1, 1, DIM))[0, 0], want[token])


BITS = """
import sys, torch
from tests.unit.test_moe import DIM, corrected
torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(7)
x = torch.randn(1, 700, DIM)
for dtype in (torch.float32, torch.bfloat16):
    for routing in ("deepseek", "qwen"):
        out = corrected(dtype, routing=routing)(x.to(dtype)).double()
        print(out.sum().item(), out.abs().max().item(), out[0, ::7].square().sum(0).tolist())
"""


def test_the_number_of_threads_does_not_matter():
    bits = [python(BITS, threads) for threads in ("1", "2", "3")]
    assert bits[0].stdout and {done.stdout for done in bits} == {bits[0].stdout}, bits[0].stderr


@pytest.mark.parametrize("function", ["silu", "sigmoid"])
def test_float32_activations_do_not_depend_on_the_place(function):
    ours, theirs = getattr(exact, function), getattr(F, function)
    x = (torch.randn(100_001) * 4).requires_grad_()
    whole = ours(x)
    assert torch.equal(torch.cat([ours(part) for part in x.split(7)]), whole)
    assert torch.allclose(whole, theirs(x), rtol=1e-6)
    (ours_grad,) = torch.autograd.grad(whole.sum(), x)
    (want_grad,) = torch.autograd.grad(theirs(x).sum(), x)
    assert torch.allclose(ours_grad, want_grad, rtol=1e-5, atol=1e-7)
    extremes = torch.tensor([-1e4, -100.0, 0.0, 100.0], requires_grad=True)
    (grad,) = torch.autograd.grad(ours(extremes).sum(), extremes)
    assert torch.equal(ours(extremes), theirs(extremes)) and grad.isfinite().all()


@pytest.mark.parametrize("function", ["silu", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_activations_need_no_correction(function, dtype):
    """All finite numbers, in the vectorized kernel and one by one."""
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    x, apply = every[every.isfinite()], getattr(F, function)
    assert torch.equal(torch.cat([apply(one) for one in x.split(1)]), apply(x.repeat(2))[: len(x)])


def test_casting_keeps_the_bias_and_the_counts_in_float32():
    moe = corrected(torch.bfloat16)
    assert {p.dtype for p in moe.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in moe.buffers()} == {torch.float32}
    with parameters_as(torch.bfloat16):
        assert {b.dtype for b in titan_moe().buffers()} == {torch.float32}


def test_names_stay_and_a_copy_is_independent():
    moe = corrected()
    assert list(moe.state_dict()) == list(titan_moe().state_dict())
    x, twin = torch.randn(1, 5, DIM), copy.deepcopy(moe)
    want = moe(x)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(moe(x), want) and not twin(x).any()


def test_quantizing_subclasses_are_left_alone():
    from torchtitan.models.common.moe import GroupedExperts

    class Quantized(GroupedExperts):
        def _grouped_mm(self, *, A, B_t, offs):
            return torch._grouped_mm(A, B_t, offs=offs)

    moe = titan_moe()
    moe.routed_experts.inner_experts.__class__ = Quantized
    correct_feed_forward(moe)
    assert "forward" not in vars(moe.routed_experts.inner_experts)


@pytest.mark.parametrize(
    ("dtype", "routing"), [(torch.float32, "deepseek"), (torch.bfloat16, "qwen")]
)
def test_compiled_serving_gives_the_bits_of_training(dtype, routing):
    moe = corrected(dtype, routing=routing)
    options = {"emulate_precision_casts": True}
    compiled = torch.compile(moe, fullgraph=True, dynamic=True, options=options)
    for rows in (33, 2, 70):
        x = torch.randn(1, rows, DIM).to(dtype)
        with torch.inference_mode():
            got = compiled(x)
        assert torch.equal(got, moe(x)), rows


def test_recording_needs_a_router_that_runs():
    no_router = pytest.raises(ValueError, match="Linear has no mixture-of-experts router")
    with no_router, record_routing(nn.Linear(2, 2)):
        pass
    moe = corrected()
    idle = pytest.raises(ValueError, match="no call was seen of the routers router: run the model")
    with idle, record_routing(moe):
        pass
    assert not moe.router._forward_hooks


@pytest.fixture
def packed():
    """A layer in bf16 behind packed copies, its groups, and one that is like it without any."""
    pytest.importorskip("vllm")
    from vllm_graft.kernels import packed_bf16
    from vllm_graft.serve._vllm_packed import CpuPacker

    if not packed_bf16.available():
        pytest.skip("packed experts need Graft's own products")
    moe = corrected(torch.bfloat16)
    with torch.no_grad(), products.watching() as calls:
        moe(torch.randn(1, 9, DIM).bfloat16())
    groups = products.pack_products(calls, CpuPacker(exact=True))
    for group in groups:
        group.pack()
    return moe, groups, corrected(torch.bfloat16)


def served(moe, x):
    with torch.no_grad(), products.serving():
        return moe(x)


@pytest.mark.parametrize("tokens", [1, 2, 5, 40])
def test_packed_experts_have_the_bits_of_training(packed, tokens):
    moe, groups, plain = packed
    assert [len(group._members) for group in groups if group._weights[0].dim() == 3] == [2, 1]
    x = torch.randn(1, tokens, DIM).bfloat16()
    assert torch.equal(served(moe, x), plain(x))
    assert torch.equal(moe(x), plain(x))


def test_packed_experts_are_released_and_come_back(packed):
    moe, groups, plain = packed
    x = torch.randn(1, 7, DIM).bfloat16()
    for group in groups:
        group.release()
    assert moe.routed_experts.inner_experts.w2_EDF.isnan().all()
    assert torch.equal(served(moe, x), plain(x))
    products.restore_weights(moe)
    for name, parameter in plain.named_parameters():
        assert torch.equal(moe.get_parameter(name), parameter), name


def test_changed_experts_are_packed_anew(packed):
    moe, groups, plain = packed
    x = torch.randn(1, 7, DIM).bfloat16()
    with torch.no_grad():
        for layer in (moe, plain):
            layer.routed_experts.inner_experts.w3_EFD.mul_(2)
    for group in groups:
        group.refresh()
    assert torch.equal(served(moe, x), plain(x))
    copied = copy.deepcopy(moe)
    assert torch.equal(served(copied, x), plain(x))
    assert copied.routed_experts.inner_experts.graft_stacks["w1_EFD"].graft_packed is None


def test_experts_one_by_one_are_not_recorded_in_a_cuda_graph(monkeypatch):
    """The host reads their counts."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    counts = SimpleNamespace(is_cuda=True)
    with pytest.raises(RuntimeError, match=r"float16 .*enforce_eager=True.*bfloat16"):
        by_expert(torch.add, torch.zeros(2, 3, dtype=torch.float16), counts)
