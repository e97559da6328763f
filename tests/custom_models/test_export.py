"""What the examples export is the checkpoint again, and Transformers loads it."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from examples.custom_models.deepseek_v3_torchtitan import build_deepseek_v3_torchtitan
from examples.custom_models.qwen3_torchtitan import build_qwen3_torchtitan
from tests.custom_models.test_qwen3_torchtitan import vllm_config
from tests.moe_checkpoints import deepseek_v3_checkpoint, qwen3_moe_checkpoint
from tests.support import qwen3_checkpoint
from vllm_graft import WeightError, export_weights


def exported(config, checkpoint, build=build_qwen3_torchtitan):
    """The checkpoint's tensors through TorchTitan's model and back."""
    model = build(vllm_config(config), None)
    tensors = load_file(checkpoint / "model.safetensors")
    model.load_weights(tensors.items())
    result = dict(export_weights(model.model, model.name_mapping))
    assert result.keys() == tensors.keys()
    assert all(torch.equal(result[name], tensors[name]) for name in tensors)
    return result


@pytest.mark.parametrize("kind", ["tied", "untied", "experts"])
def test_transformers_loads_an_exported_qwen3(kind, tmp_path):
    from transformers import AutoModelForCausalLM

    source, copy = tmp_path / "source", tmp_path / "copy"
    if kind == "experts":
        qwen3_moe_checkpoint(source, decoder_sparse_step=2, num_hidden_layers=4)
    else:
        qwen3_checkpoint(source, tie_word_embeddings=kind == "tied")
    reference = AutoModelForCausalLM.from_pretrained(source)
    copy.mkdir()
    shutil.copy(source / "config.json", copy)
    save_file(
        exported(reference.config, source), copy / "model.safetensors", metadata={"format": "pt"}
    )
    again, info = AutoModelForCausalLM.from_pretrained(copy, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in reference.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("interleaved", [True, False], ids=["pairs", "halves"])
def test_deepseek_v3_comes_back_as_it_was(interleaved, tmp_path):
    from transformers import AutoConfig

    checkpoint = deepseek_v3_checkpoint(tmp_path, rope_interleave=interleaved)
    exported(AutoConfig.from_pretrained(checkpoint), checkpoint, build_deepseek_v3_torchtitan)


def deepseek_tensors(folder, **overrides):
    """A DeepSeek V3 model for a config changed by `overrides`, and its unchanged checkpoint."""
    from transformers import AutoConfig

    checkpoint = deepseek_v3_checkpoint(folder)
    config = AutoConfig.from_pretrained(checkpoint)
    for name, value in overrides.items():
        setattr(config, name, value)
    model = build_deepseek_v3_torchtitan(vllm_config(config), None)
    return model, load_file(checkpoint / "model.safetensors")


def test_tensors_that_the_config_has_no_place_for_are_refused(tmp_path):
    model, tensors = deepseek_tensors(tmp_path, n_shared_experts=0)
    with pytest.raises(WeightError, match="no place in the model .*shared_experts"):
        model.load_weights(tensors.items())


def test_a_layer_of_the_decoder_is_not_dropped_as_multi_token_prediction(tmp_path):
    model, tensors = deepseek_tensors(tmp_path, num_hidden_layers=2, num_nextn_predict_layers=1)
    with pytest.raises(WeightError, match="model.layers.2 would be dropped .*no eh_proj"):
        model.load_weights(tensors.items())
