"""Writing the trained model as an ordinary Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from examples.custom_models.qwen3_torchtitan import NAME_MAPPING
from examples.demo.train import QWEN3
from vllm_graft.weights.mapping import NameMap


def write_checkpoint(folder: Path, model: Any, tokenizer: Any) -> Path:
    """Write config, weights and tokenizer to `folder` and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    QWEN3.save_pretrained(folder)
    save_file(huggingface_state(model), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    return folder


def huggingface_state(model: Any) -> dict[str, torch.Tensor]:
    """The parameters under their Hugging Face names; a tied one is written once."""
    to_huggingface = NameMap({titan: name for name, titan in NAME_MAPPING.items()})
    state = {}
    for titan, parameter in model.named_parameters():
        place = to_huggingface(titan)
        if place is None or place.target is None:
            raise ValueError(f"{titan}: no Hugging Face name in NAME_MAPPING")
        state[place.target] = parameter.detach().contiguous()
    return state
