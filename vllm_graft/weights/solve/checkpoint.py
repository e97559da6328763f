"""Names, shapes and config of a checkpoint; its tensors are read one at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from vllm_graft.weights.errors import WeightError

Source = str | os.PathLike[str] | Mapping[str, torch.Tensor]


class Checkpoint:
    """A folder with `config.json` and safetensors, or names to tensors.

    Raises:
        WeightError: no such folder, or nothing in it.
    """

    def __init__(self, source: Source, config: Mapping[str, Any] | None) -> None:
        self._source = source
        self._files = [] if isinstance(source, Mapping) else _files(Path(source))
        self.config = dict(config or {}) or self._own_config()
        self.tensors = {
            name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self._described()
        }

    def read(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors."""
        if isinstance(self._source, Mapping):
            yield from self._source.items()
            return
        from safetensors import safe_open

        for file in self._files:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - no mapping
                    yield name, opened.get_tensor(name)

    def _described(self) -> Iterator[tuple[str, torch.Tensor]]:
        # Mapped files: of their tensors nothing is read until it is used.
        seen: set[str] = set()
        for name, tensor in self.read():
            if name in seen:
                raise WeightError(f"checkpoint tensor {name!r} is in two files")
            seen.add(name)
            yield name, tensor

    def _own_config(self) -> dict[str, Any]:
        if isinstance(self._source, Mapping):
            return {}
        path = Path(self._source) / "config.json"
        if not path.is_file():
            return {}
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return config


def _files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightError(f"{folder}: no *.safetensors here; expected a checkpoint folder")
    return files
