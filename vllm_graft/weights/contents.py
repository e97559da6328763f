"""What a model takes and gives under checkpoint names. Torch only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from vllm_graft.weights.errors import WeightError
from vllm_graft.weights.export import export_weights, exported_shapes
from vllm_graft.weights.load import Load
from vllm_graft.weights.mapping import NameMapping
from vllm_graft.weights.slots import tied_names


class Contents:
    """The weights of `model` as a checkpoint has them.

    Args:
        model: a module with parameters, sharded or not.
        name_mapping: the mapping that loads a checkpoint into it. Without one, what the
            model's own `load_weights` gives to `load_external_weights`.

    Raises:
        WeightError: no mapping to be found, or one that cannot be reversed.
    """

    def __init__(self, model: nn.Module, name_mapping: NameMapping | None = None) -> None:
        self._mappings = _found(model) if name_mapping is None else [(model, name_mapping)]
        self.described: dict[str, tuple[torch.dtype, torch.Size]] = {}
        """Name to dtype and whole shape, in the order of `tensors`."""
        for part, mapping in self._mappings:
            self.described |= exported_shapes(part, mapping)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The whole tensors, as `export_weights` gives them: every rank must take them all."""
        for part, mapping in self._mappings:
            yield from export_weights(part, mapping)


def _found(model: Any) -> list[tuple[nn.Module, NameMapping]]:
    """The mappings of a model that loads itself, learnt from a load of nothing."""
    load = Load(tied_names(model))
    if callable(getattr(model, "load_weights", None)):
        with load.running():
            model.load_weights(iter(()))
    if not load.mappings():
        raise WeightError(
            f"{type(model).__name__} has no load_weights that calls load_external_weights, so its "
            "checkpoint names are not known; pass name_mapping"
        )
    return load.mappings()
