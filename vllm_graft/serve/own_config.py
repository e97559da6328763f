"""A model's own config object under the names that vLLM reads (Hugging Face's)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORMAT = "graft"
"""Name of the config format for vLLM's `config_format`."""
_ATTRIBUTES = ("config", "args", "params", "cfg", "model_args", "hparams")
"""Where models keep their config object."""
_NAMES = {
    "vocab_size": ("n_vocab", "padded_vocab_size", "num_tokens"),
    "hidden_size": ("n_embd", "dim", "d_model", "embed_dim", "n_embed"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers", "depth"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads", "nhead", "heads"),
    "max_position_embeddings": (
        "block_size", "max_seq_len", "n_positions", "n_ctx", "context_length", "max_length",
        "max_seq_length", "seq_len",
    ),
}  # fmt: skip
"""What vLLM must know, and what else it is called."""
_OPTIONAL = {"num_key_value_heads": ("n_kv_head", "n_kv_heads", "num_kv_heads", "n_local_heads")}


def is_own(folder: Path) -> bool:
    """Whether a checkpoint folder has no Hugging Face `config.json`."""
    return folder.is_dir() and "model_type" not in _file(folder)


def has_tokenizer(folder: Path) -> bool:
    """Whether a checkpoint folder has one that Transformers reads; a Hub name counts as one."""
    files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    return not folder.is_dir() or any((folder / name).is_file() for name in files)


def described(folder: Path, factory: Callable[..., Any]) -> dict[str, Any]:
    """Fields of a config: the model's own, and the same under Hugging Face's names.

    Args:
        folder: its `config.json` is taken if there is one.
        factory: else it builds the model, without weights, and the model's config is taken.

    Raises:
        ValueError: a size that vLLM must know is not there.
    """
    own = _file(folder) or _of_model(folder, factory)
    fields = {k: v for k, v in own.items() if isinstance(v, (int, float, str, list, type(None)))}
    for name, others in (_NAMES | _OPTIONAL).items():
        given = next((fields[n] for n in (name, *others) if fields.get(n) is not None), None)
        if given is not None:
            fields[name] = given
        elif name in _NAMES:
            raise ValueError(
                f"{folder}: the model's config has no {name}, nor {', '.join(others)}; it has "
                f"{', '.join(sorted(fields)) or 'nothing'}"
            )
    return fields


def _file(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        return {}
    fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return fields


def _of_model(folder: Path, factory: Callable[..., Any]) -> dict[str, Any]:
    import torch  # the command line reads this file, and starts without torch

    with torch.device("meta"):
        try:
            model = factory()
        except TypeError as error:
            raise ValueError(
                f"{folder}: without a config.json the factory is called with no arguments, which "
                f"fails ({error}); write the model's sizes into a config.json or give defaults"
            ) from error
    return _values(_config_of(model))


def _config_of(model: Any) -> Any:
    for name in _ATTRIBUTES:
        config = getattr(model, name, None)
        if config is not None:
            return config
    raise ValueError(
        f"{type(model).__name__} keeps no config object ({', '.join(_ATTRIBUTES)}) and the "
        "checkpoint has no config.json; vLLM must know the model's sizes"
    )


def _values(config: Any) -> dict[str, Any]:
    if isinstance(config, dict):
        return config
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return dataclasses.asdict(config)
    return {k: getattr(config, k) for k in dir(config) if not k.startswith("_")}
