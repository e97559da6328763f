"""Transformers' mixtures of experts: a token's bits are its own, the layer is what it was."""

from __future__ import annotations

import copy
from importlib import import_module

import pytest
import torch
from torch import nn

from tests.support import relative_error, spread_weights
from vllm_graft.exact import make_exact
from vllm_graft.families.transformers_moe import correct_experts

DIM, EXPERTS, TOP_K = 96, 8, 3
SIZES = {
    "hidden_size": DIM, "intermediate_size": 48, "moe_intermediate_size": 48,
    "num_experts_per_tok": TOP_K,
}  # fmt: skip
BLOCKS = {
    "qwen3_moe": ("Qwen3MoeSparseMoeBlock", {"num_experts": EXPERTS, "norm_topk_prob": True}),
    # A shared expert behind a gate that the block itself puts through a sigmoid.
    "qwen2_moe": (
        "Qwen2MoeSparseMoeBlock",
        {"num_experts": EXPERTS, "shared_expert_intermediate_size": 48},
    ),
    # Transposed weights, biases, gate and up interleaved.
    "gpt_oss": ("GptOssMLP", {"num_local_experts": EXPERTS}),
    "deepseek_v3": ("DeepseekV3MoE", {"n_routed_experts": EXPERTS, "n_group": 4, "topk_group": 2}),
    # A router that is an `nn.Linear` of its own kind, and one with a module inside.
    "phimoe": ("PhimoeSparseMoeBlock", {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}),
    "ernie4_5_moe": ("Ernie4_5_MoeSparseMoeBlock", {"moe_num_experts": EXPERTS, "moe_k": TOP_K}),
    # Experts without a gate.
    "nemotron_h": (
        "NemotronHMoE",
        {"n_routed_experts": EXPERTS, "moe_shared_expert_intermediate_size": 48},
    ),
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def block_of(kind, implementation="grouped_mm"):
    """A layer of Transformers as it comes, under a parent as in a model."""
    from transformers import AutoConfig

    name, sizes = BLOCKS[kind]
    config = AutoConfig.for_model(kind, **(SIZES | sizes))
    config._experts_implementation = implementation
    made = getattr(import_module(f"transformers.models.{kind}.modeling_{kind}"), name)(config)
    return nn.ModuleDict({"mlp": spread_weights(made)}).eval()


def corrected(kind, dtype=torch.float32):
    """The layer after what `adapt` and the adapter do to it."""
    from vllm_graft.families.transformers_exact import correct_layers

    layer = block_of(kind)
    correct_layers(layer)
    make_exact(layer)
    return layer.to(dtype)


def run(layer, x_TD):
    out = layer["mlp"](x_TD[None])
    return (out[0] if isinstance(out, tuple) else out)[0]


@pytest.mark.parametrize("kind", BLOCKS)
@DTYPES
def test_a_token_gets_the_same_bits_alone_and_in_any_batch(kind, dtype):
    layer = corrected(kind, dtype)
    x = torch.randn(70, DIM).to(dtype)
    want = run(layer, x)
    generator = torch.Generator().manual_seed(3)
    for rows in range(1, 71):
        order = torch.randperm(70, generator=generator)[:rows]
        assert torch.equal(run(layer, x[order]), want[order]), rows


@pytest.mark.parametrize("kind", BLOCKS)
def test_values_and_gradients_are_those_of_transformers_in_float64(kind):
    layer, reference = corrected(kind), block_of(kind, "eager").double()
    # PhiMoE's estimate of the router's gradient jumps where two scores are nearly equal.
    torch.manual_seed(1)
    x = torch.randn(40, DIM, requires_grad=True)
    x64 = x.detach().double().requires_grad_()
    weight = torch.randn(40, DIM)
    got, want = run(layer, x), run(reference, x64)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    # fp32, sums over at most 96 terms.
    assert relative_error(got, want) < 2e-6
    assert relative_error(x.grad, x64.grad) < 2e-6
    for (name, own), other in zip(layer.named_parameters(), reference.parameters(), strict=True):
        assert (own.grad is None) == (other.grad is None), name
        assert own.grad is None or relative_error(own.grad, other.grad) < 5e-6, name


def test_the_uncorrected_experts_depend_on_the_batch():
    """Fails when Transformers' experts no longer do; the correction can then go."""
    layer, x = block_of("qwen3_moe"), torch.randn(70, DIM)
    want = run(layer, x)
    assert not all(torch.equal(run(layer, x[:rows]), want[:rows]) for rows in range(1, 70))


def test_names_stay_and_a_copy_is_independent():
    layer = corrected("qwen3_moe")
    assert list(layer.state_dict()) == list(block_of("qwen3_moe").state_dict())
    x, twin = torch.randn(5, DIM), copy.deepcopy(layer)
    want = run(layer, x)
    assert torch.equal(run(twin, x[:3]), want[:3])
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(run(layer, x), want) and not run(twin, x).any()


def test_experts_with_a_forward_of_their_own_are_left_alone():
    layer = block_of("qwen3_moe")
    experts = layer["mlp"].experts

    class Own(type(experts)):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return hidden_states

    experts.__class__ = Own
    correct_experts(layer)
    assert not any("forward" in vars(module) for module in layer.modules())
