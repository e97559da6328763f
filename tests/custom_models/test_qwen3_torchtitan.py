"""The Qwen3 example as its users test it: creation, forward, config mapping, script."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from examples.custom_models.qwen3_torchtitan import (
    Qwen3TorchTitanForCausalLM,
    build_qwen3_torchtitan,
    refuse_unsupported,
)
from tests.moe_checkpoints import qwen3_moe_checkpoint
from tests.support import qwen3_checkpoint, relative_error
from vllm_graft import ParallelContext


def config(**overrides):
    from transformers import Qwen3Config

    sizes = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    }  # fmt: skip
    return Qwen3Config(**(sizes | overrides))


def vllm_config(hf_config, dtype=torch.float32):
    model_config = SimpleNamespace(max_model_len=128, dtype=dtype)
    return SimpleNamespace(hf_config=hf_config, model_config=model_config)


def test_creation_and_forward_outside_vllm():
    model = Qwen3TorchTitanForCausalLM(vllm_config(config()))
    flat = model(torch.arange(9))
    assert flat.shape == (9, 64)
    assert torch.equal(model(torch.arange(9)[None])[0], flat)
    assert model.compute_logits(flat).shape == (9, 64)


@pytest.mark.parametrize("tied", [False, True])
def test_it_computes_what_transformers_computes(tied, tmp_path):
    from safetensors.torch import load_file
    from transformers import Qwen3ForCausalLM

    overrides = {
        "tie_word_embeddings": tied, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
        "rms_norm_eps": 1e-4,
    }  # fmt: skip
    checkpoint = qwen3_checkpoint(tmp_path, **overrides)
    reference = Qwen3ForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
    model = build_qwen3_torchtitan(vllm_config(reference.config), None)
    model.load_weights(load_file(checkpoint / "model.safetensors").items())
    tokens = torch.randint(0, 512, (2, 40))
    # fp32 through three layers, other kernels for norm, RoPE and attention.
    want = reference(tokens).logits
    assert relative_error(model.compute_logits(model(tokens)), want) < 1e-5


MIXED = {
    "all_sparse": {},
    "every_second": {"decoder_sparse_step": 2, "num_hidden_layers": 4},
    "chosen_dense": {"mlp_only_layers": [0, 2], "norm_topk_prob": False},
    "window": {"use_sliding_window": True, "sliding_window": 16},
}


@pytest.mark.parametrize("layers", MIXED)
def test_mixtures_of_experts_compute_what_transformers_computes(layers, tmp_path):
    from safetensors.torch import load_file
    from transformers import Qwen3MoeForCausalLM

    checkpoint = qwen3_moe_checkpoint(tmp_path, **MIXED[layers])
    reference = Qwen3MoeForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
    model = build_qwen3_torchtitan(vllm_config(reference.config), None)
    model.load_weights(load_file(checkpoint / "model.safetensors").items())
    tokens = torch.randint(0, 512, (2, 40))
    # fp32 through three layers, other kernels for norm, RoPE, attention and experts.
    assert relative_error(model.compute_logits(model(tokens)), reference(tokens).logits) < 1e-5


def test_the_factory_casts_without_ruining_rope():
    model = build_qwen3_torchtitan(vllm_config(config(), torch.bfloat16), None)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.layers["0"].attention.rope.cache.dtype == torch.float32


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ({"attention_bias": True}, r"attention_bias=True \(supported: False\)"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                 "original_max_position_embeddings": 32}},
            "rope_parameters.rope_type='yarn'",
        ),
    ],
)  # fmt: skip
def test_fields_it_cannot_honour_are_refused_by_name(overrides, text):
    with pytest.raises(ValueError, match=text):
        refuse_unsupported(config(**overrides))


def test_tensor_parallelism_within_stages_is_refused():
    context = ParallelContext(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    with pytest.raises(ValueError, match="tensor_parallel_size=2 with pipeline_parallel_size=2"):
        build_qwen3_torchtitan(vllm_config(config()), context)


def test_heads_that_the_ranks_cannot_share_are_refused_by_name():
    context = ParallelContext(tensor_model_parallel_size=3)
    text = "layers.0.attention.inner_attention: num_heads=4 cannot be divided among .*size=3"
    with pytest.raises(ValueError, match=text):
        build_qwen3_torchtitan(vllm_config(config()), context)
