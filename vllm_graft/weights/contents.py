"""What a model takes and gives under checkpoint names. Torch only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from vllm_graft.weights.errors import WeightError
from vllm_graft.weights.export import export_weights, exported_shapes
from vllm_graft.weights.load import Load
from vllm_graft.weights.mapping import NameMapping
from vllm_graft.weights.slots import tied_names

_Weights = Iterator[tuple[str, torch.Tensor]]


class Contents:
    """The weights of `model` as a checkpoint has them.

    Args:
        model: a module with parameters, sharded or not.
        name_mapping: the mapping that loads a checkpoint into it. Without one, what the
            model's own `load_weights` gives to `load_external_weights`; a model that joins
            tensors of the checkpoint before that takes them apart in `split_weights`.

    Raises:
        WeightError: no mapping to be found, or one that cannot be reversed.
    """

    def __init__(self, model: nn.Module, name_mapping: NameMapping | None = None) -> None:
        self._mappings = _found(model) if name_mapping is None else [(model, name_mapping)]
        split = getattr(model, "split_weights", None) if name_mapping is None else None
        self._split: Callable[[_Weights], _Weights] = split or iter
        self.described: dict[str, tuple[torch.dtype, torch.Size]] = {
            name: (tensor.dtype, tensor.shape) for name, tensor in self._split(self._on_meta())
        }
        """Name to dtype and whole shape, in the order of `tensors`."""

    def tensors(self) -> _Weights:
        """The whole tensors, as `export_weights` gives them: every rank must take them all."""
        return self._split(self._exported())

    def _exported(self) -> _Weights:
        for part, mapping in self._mappings:
            yield from export_weights(part, mapping)

    def _on_meta(self) -> _Weights:
        for part, mapping in self._mappings:
            for name, (dtype, shape) in exported_shapes(part, mapping).items():
                yield name, torch.empty(shape, dtype=dtype, device="meta")


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
