"""Megatron's latent attention without an engine: numbers, gradients, weights, refusals."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from examples.custom_models.megatron_config import refuse_unsupported
from examples.custom_models.megatron_gpt import gpt_model
from tests.megatron_checkpoints import deepseek_checkpoint
from tests.moe_checkpoints import YARN
from tests.support import relative_error
from tests.unit.test_megatron import assert_gradients_are_equal, build
from vllm_graft import TrainableMLA, export_weights, packed, replace_with_trainable_attention
from vllm_graft.exact import make_exact
from vllm_graft.families.megatron_mla import LatentSeam

VARIANTS = {
    "plain": {},
    "direct_query": {"q_lora_rank": None},
    "yarn": {"rope_parameters": YARN, "rms_norm_eps": 1e-4},
    "yarn_with_a_factor_on_cosines": {"rope_parameters": YARN | {"mscale_all_dim": 0.5}},
    "half_split_rope": {"rope_interleave": False},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return deepseek_checkpoint(tmp_path_factory.mktemp("deepseek"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_and_gradients_are_those_of_transformers(variant, tmp_path):
    from transformers import DeepseekV3ForCausalLM

    checkpoint = deepseek_checkpoint(tmp_path, **VARIANTS[variant])
    reference = DeepseekV3ForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
    model = build(checkpoint)
    tokens, labels = torch.randint(0, 512, (2, 100)), torch.randint(0, 512, (200,))
    got, want = model.compute_logits(model(tokens)), reference(tokens).logits
    # fp32 through three layers, other kernels and another order of products in attention.
    assert relative_error(got, want) < 1e-5
    for logits in (got, want):
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels).backward()
    assert_gradients_are_equal(model, reference)


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_come_back_exactly(variant, tmp_path):
    checkpoint = deepseek_checkpoint(tmp_path, **VARIANTS[variant])
    tensors, model = load_file(checkpoint / "model.safetensors"), build(checkpoint)
    exported = dict(export_weights(model.model, model.name_mapping))
    assert exported.keys() == tensors.keys()
    assert all(torch.equal(exported[name], tensors[name]) for name in tensors)


def test_blocks_keep_their_class_and_names_and_share_one_table(checkpoint):
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    model = build(checkpoint).model
    blocks = [layer.self_attention for layer in model.decoder.layers]
    assert all(isinstance(b, MLASelfAttention) and isinstance(b, TrainableMLA) for b in blocks)
    assert len({id(block.rotary_pos_emb) for block in blocks}) == 1
    assert not [name for name in model.state_dict() if "core_attention" in name]
    report = replace_with_trainable_attention(model, use_mla=True)
    assert str(report) == "0 of 3 attention layers swapped (mla 4 heads, 1 KV heads, head_dim 576)"
    with pytest.raises(ValueError, match="is latent attention .* call with use_mla=True"):
        replace_with_trainable_attention(model, use_mla=False)


def test_packed_samples_do_not_see_each_other(checkpoint):
    model = build(checkpoint)
    tokens = torch.randint(0, 512, (12,))
    alone = torch.cat([model(tokens[:5]), model(tokens[5:])])
    with packed([0, 5, 12]):
        assert relative_error(model(tokens), alone) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tokens_row_does_not_depend_on_the_batch(checkpoint, dtype):
    model = build(checkpoint, dtype)
    make_exact(model)
    tokens = torch.randint(0, 512, (40,))
    with torch.no_grad():
        whole = model.compute_logits(model(tokens))
        for count in (1, 2, 3, 5, 9, 11, 33):
            assert torch.equal(model.compute_logits(model(tokens[:count])), whole[:count])


def test_a_block_that_was_never_swapped_says_so():
    with pytest.raises(RuntimeError, match="call replace_with_trainable_attention"):
        LatentSeam(k_channels=192)(None)


@pytest.mark.parametrize("field", ["rotary_interleaved", "cache_mla_latents"])
def test_what_the_block_cannot_honour_is_refused(checkpoint, field):
    from transformers import AutoConfig

    model = gpt_model(AutoConfig.from_pretrained(checkpoint), 64, torch.float32, None)
    setattr(model.config, field, True)
    with pytest.raises(ValueError, match=rf"layers.0.self_attention: .*{field}=True"):
        replace_with_trainable_attention(model, use_mla=True)
    assert isinstance(model.decoder.layers[0].self_attention.core_attention, LatentSeam)


@pytest.mark.parametrize(
    ("overrides", "tp_size", "text"),
    [
        (
            {"first_k_dense_replace": 1, "n_routed_experts": 8},
            1,
            "has them .n_routed_experts=8.; .* as Qwen3TorchTitan",
        ),
        ({"rope_parameters": YARN | {"mscale": None}}, 1, "mscale_all_dim both or neither=False"),
        ({"rope_parameters": YARN | {"truncate": False}}, 1, "truncate=False"),
        ({"q_lora_rank": None}, 2, "q_lora_rank is None=True"),
    ],
)
def test_config_fields_it_cannot_honour_are_refused_by_name(overrides, tp_size, text):
    from transformers import DeepseekV3Config

    fields = {"num_hidden_layers": 3, "first_k_dense_replace": 3} | overrides
    with pytest.raises(ValueError, match=text):
        refuse_unsupported(DeepseekV3Config(**fields), tp_size)
