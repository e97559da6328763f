"""Writing the trained model as an ordinary Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from examples.custom_models.qwen3_torchtitan import NAME_MAPPING
from examples.demo.train import QWEN3
from vllm_graft import export_weights


def write_checkpoint(folder: Path, model: Any, tokenizer: Any) -> Path:
    """Write config, weights and tokenizer to `folder` and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    QWEN3.save_pretrained(folder)
    tensors = dict(export_weights(model, NAME_MAPPING))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    return folder
