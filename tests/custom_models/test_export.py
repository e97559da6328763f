"""What the examples export is the checkpoint again, and Transformers loads it."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from examples.custom_models.qwen3_torchtitan import build_qwen3_torchtitan
from tests.custom_models.test_qwen3_torchtitan import vllm_config
from tests.moe_checkpoints import qwen3_moe_checkpoint
from tests.support import qwen3_checkpoint
from vllm_graft import export_weights


def exported(reference, checkpoint):
    """The checkpoint's tensors through TorchTitan's model and back."""
    model = build_qwen3_torchtitan(vllm_config(reference.config), None)
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
    save_file(exported(reference, source), copy / "model.safetensors", metadata={"format": "pt"})
    again, info = AutoModelForCausalLM.from_pretrained(copy, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in reference.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
