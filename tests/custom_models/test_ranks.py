"""Sharded models on the ranks there are: `pytest` has one, `torchrun -m pytest` several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from examples.custom_models.megatron_gpt import build_megatron_model
from examples.custom_models.qwen3_torchtitan import build_qwen3_torchtitan
from tests.dist import dtensor_plan
from tests.support import QWEN3_SIZES, gathered_gradient, relative_error, spread_weights
from vllm_graft import ParallelContext
from vllm_graft.attention.shard import shard_attention
from vllm_graft.weights.shards import local

TITAN_NAMES = {
    "layers.0.attention.qkv_linear.wk.weight": "model.layers.0.self_attn.k_proj.weight",
    "layers.1.attention.wo.weight": "model.layers.1.self_attn.o_proj.weight",
    "layers.2.attention.q_norm.weight": "model.layers.2.self_attn.q_norm.weight",
    "tok_embeddings.weight": "model.embed_tokens.weight",
}
"""A column-parallel, a row-parallel, a replicated and a vocabulary-parallel parameter."""
MEGATRON_NAMES = {
    "output_layer.weight": "lm_head.weight",
    "decoder.layers.0.mlp.linear_fc2.weight": "model.layers.0.mlp.down_proj.weight",
    "decoder.layers.2.self_attention.q_layernorm.weight": "model.layers.2.self_attn.q_norm.weight",
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
}
PLAN_NAMES = ("layers.0.attention.wk.weight", "layers.1.down.weight", "layers.1.norm.weight")


@dataclass(frozen=True)
class Pair:
    """An independent whole model and this rank's share of the one under test."""

    reference: nn.Module
    logits: Callable[[torch.Tensor], torch.Tensor]
    """Of the reference, for tokens `[B, L]`."""
    model: Any
    names: dict[str, str]
    """Parameters of the share, and what the reference calls them."""


def beside_transformers(
    factory: Callable[..., Any], names: dict[str, str], context: ParallelContext
) -> Pair:
    """A library's Qwen3 and Transformers'."""
    # In memory: under torchrun, Transformers writes checkpoints on one rank only.
    reference = Qwen3ForCausalLM(Qwen3Config(**QWEN3_SIZES, attn_implementation="eager"))
    spread_weights(reference)
    model = factory(settings(reference.config), context)
    model.load_weights(reference.state_dict().items())
    return Pair(reference, lambda tokens: reference(tokens).logits, model, names)


def beside_the_original(context: ParallelContext) -> Pair:
    """A hand-written model under a DTensor plan, and the same untouched."""
    hf_config = SimpleNamespace(**QWEN3_SIZES)
    original = spread_weights(dtensor_plan.plain_model(hf_config)).eval()
    model = dtensor_plan.by_context(settings(hf_config), context).eval()
    # In vLLM the adapter does it.
    shard_attention(model, context.get_tensor_parallel_world_size())
    theirs = {ours: hf for hf, ours in model.name_mapping.items()}
    model.load_weights((theirs[name], tensor) for name, tensor in original.named_parameters())
    names = {name: name for name in PLAN_NAMES}
    return Pair(original, lambda tokens: original.output(original(tokens)), model, names)


def settings(hf_config: Any) -> SimpleNamespace:
    """What the factories read of vLLM's config."""
    model_config = SimpleNamespace(max_model_len=128, dtype=torch.float32)
    return SimpleNamespace(hf_config=hf_config, model_config=model_config)


PAIRS: dict[str, Callable[[ParallelContext], Pair]] = {
    "torchtitan": lambda c: beside_transformers(build_qwen3_torchtitan, TITAN_NAMES, c),
    "megatron": lambda c: beside_transformers(build_megatron_model, MEGATRON_NAMES, c),
    "dtensor": beside_the_original,
}


@pytest.fixture(scope="module", params=PAIRS)
def pair(request, distributed_setup):
    _, world_size = distributed_setup
    with torch.device(local_device()):  # as vLLM calls a factory
        return PAIRS[request.param](ParallelContext(tensor_model_parallel_size=world_size))


def test_each_rank_holds_its_share(distributed_setup, pair):
    _, world_size = distributed_setup
    for name, theirs in pair.names.items():
        size = pair.reference.get_parameter(theirs).numel()
        shared = 1 if "norm" in name else world_size
        assert local(pair.model.model.get_parameter(name)).numel() == size // shared, name


def test_logits_and_gradients_are_those_of_the_whole_model(pair):
    tokens = torch.arange(60, device=local_device())[None] * 7 % 512
    want, got = pair.logits(tokens), pair.model.compute_logits(pair.model(tokens))
    # fp32 through three layers; other kernels and, on several ranks, partial sums.
    assert relative_error(got, want) < 1e-5
    for logits in (want, got):
        logits.log_softmax(-1)[..., 7].mean().backward()
    for name, theirs in pair.names.items():
        gradient = gathered_gradient(pair.model.model.get_parameter(name))
        assert relative_error(gradient, pair.reference.get_parameter(theirs).grad) < 1e-5, name


def test_without_vllm_all_ranks_are_the_tensor_parallel_group(distributed_setup):
    rank, world_size = distributed_setup
    context = ParallelContext(tensor_model_parallel_size=world_size)
    assert context.get_tensor_parallel_rank() == rank
    if world_size > 1:
        assert context.get_tp_process_group() is dist.group.WORLD
        mesh = context.tp_mesh()
        assert mesh.mesh.tolist() == list(range(world_size))
        assert (mesh.get_local_rank(), mesh.device_type) == (rank, local_device())


def test_no_group_of_that_size_is_refused_by_megatron(distributed_setup):
    _, world_size = distributed_setup
    context = ParallelContext(tensor_model_parallel_size=2 * world_size)
    assert context.get_tp_process_group() is None
    sizes = QWEN3_SIZES | {"num_key_value_heads": 4}
    state = "is not initialized" if world_size == 1 else f"has {world_size}"
    reason = f"needs a process group of {2 * world_size} ranks, but .* torch.distributed {state}"
    with pytest.raises(ValueError, match=reason):
        build_megatron_model(settings(Qwen3Config(**sizes)), context)


def local_device() -> str:
    """The device that the fixture's backend runs on."""
    return "cuda" if torch.cuda.is_available() else "cpu"
