"""A sharded model on the ranks there are: `pytest` has one, `torchrun -m pytest` several."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from examples.custom_models.qwen3_torchtitan import build_qwen3_torchtitan
from tests.support import QWEN3_SIZES, gathered_gradient, relative_error, spread_weights
from vllm_graft import ParallelContext

NAMES = {
    "layers.0.attention.qkv_linear.wk.weight": "model.layers.0.self_attn.k_proj.weight",
    "layers.1.attention.wo.weight": "model.layers.1.self_attn.o_proj.weight",
    "layers.2.attention.q_norm.weight": "model.layers.2.self_attn.q_norm.weight",
    "tok_embeddings.weight": "model.embed_tokens.weight",
}
"""A column-parallel, a row-parallel, a replicated and a vocabulary-parallel parameter."""


@pytest.fixture(scope="module")
def models(distributed_setup):
    """Transformers' model and this rank's share of TorchTitan's, after one backward each."""
    _, world_size = distributed_setup
    # In memory: under torchrun, Transformers writes checkpoints on one rank only.
    reference = Qwen3ForCausalLM(Qwen3Config(**QWEN3_SIZES, attn_implementation="eager"))
    spread_weights(reference)
    config = SimpleNamespace(
        hf_config=reference.config,
        model_config=SimpleNamespace(max_model_len=128, dtype=torch.float32),
    )
    context = ParallelContext(tensor_model_parallel_size=world_size)
    model = build_qwen3_torchtitan(config, context)
    model.load_weights(reference.state_dict().items())
    return reference, model


def test_each_rank_holds_its_share(distributed_setup, models):
    _, world_size = distributed_setup
    reference, model = models
    for name, theirs in NAMES.items():
        size = reference.get_parameter(theirs).numel()
        shared = 1 if "norm" in name else world_size
        assert model.model.get_parameter(name).numel() == size // shared, name


def test_logits_and_gradients_are_those_of_transformers(models):
    reference, model = models
    tokens = torch.arange(60)[None] * 7 % 512
    want, got = reference(tokens).logits, model.compute_logits(model(tokens))
    # fp32 through three layers; other kernels and, on several ranks, partial sums.
    assert relative_error(got, want) < 1e-5
    for logits in (want, got):
        logits.log_softmax(-1)[..., 7].mean().backward()
    for name, theirs in NAMES.items():
        parameter = model.model.get_parameter(name)
        gradient = gathered_gradient(parameter)
        assert relative_error(gradient, reference.get_parameter(theirs).grad) < 1e-5, name
