"""`save_checkpoint`: a model as a Hugging Face folder that Transformers and stock vLLM load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import nn

from vllm_graft.weights.contents import Contents
from vllm_graft.weights.mapping import NameMapping

_BESIDE = ("*.json", "*.model", "*.txt", "*.jinja")
"""Config, generation config and tokenizer, as a checkpoint's folder has them."""
_INDEX = "*.index.json"


def save_checkpoint(
    model: nn.Module,
    source: str | Path,
    folder: str | Path,
    name_mapping: NameMapping | None = None,
) -> list[str]:
    """Write `model` under checkpoint names, with the config and tokenizer of its checkpoint.

    Args:
        model: on one rank.
        source: folder of the checkpoint that the model was loaded from.
        folder: made if need be; must be empty.
        name_mapping: see `Contents`.

    Returns:
        The names written, to `model.safetensors`, in the model's dtype.

    Raises:
        FileNotFoundError: `source` has no config.json.
        FileExistsError: `folder` has files already.
        WeightError: the mapping cannot be reversed.
    """
    from safetensors.torch import save_file

    source, folder = Path(source), Path(folder)
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source}: no config.json; expected the checkpoint's folder")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder}: has files already; expected an empty or a new folder")
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in Contents(model, name_mapping).tensors()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for pattern in _BESIDE:
        for file in source.glob(pattern):
            if not file.match(_INDEX):
                shutil.copy2(file, folder)
    _describe(folder / "config.json", {tensor.dtype for tensor in tensors.values()})
    return list(tensors)


def _describe(path: Path, dtypes: set[torch.dtype]) -> None:
    """Let the config say what was written: nothing quantized, and the one dtype there is."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    if len(dtypes) == 1:
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[key] = str(dtypes.pop()).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
