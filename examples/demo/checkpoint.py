"""Writing ordinary Hugging Face checkpoints: the trained Qwen3, a random DeepSeek V3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import DeepseekV3ForCausalLM

from examples.custom_models.qwen3_torchtitan import NAME_MAPPING
from examples.demo.ports import DEEPSEEK_V3, QWEN3
from vllm_graft import export_weights


def write_checkpoint(folder: Path, model: Any, tokenizer: Any) -> Path:
    """Write config, weights and tokenizer of the trained model to `folder` and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    QWEN3.hf_config.save_pretrained(folder)
    tensors = dict(export_weights(model, NAME_MAPPING))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def write_random_checkpoint(folder: Path, tokenizer: Any) -> Path:
    """Write a random DeepSeek V3 by Transformers to `folder` and return it.

    The values are spread so that tokens vary, and experts with them: token by
    token through the embedding, and by router biases about as wide as the scores.
    """
    model: Any = DeepseekV3ForCausalLM(DEEPSEEK_V3.hf_config)
    model.model.embed_tokens.weight.mul_(10)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("e_score_correction_bias"):
            tensor.normal_(std=0.1)
        elif name.endswith("o_proj.weight"):
            # Attention is nearly uniform with random weights and would make all tokens alike.
            tensor.mul_(0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
