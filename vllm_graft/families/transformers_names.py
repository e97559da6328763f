"""Checkpoint names of a Transformers model whose modules have other names, or fused experts.

Transformers converts a checkpoint while it loads: it renames, and stacks experts. Sent
through the way back, the numbers of the rows show where each checkpoint tensor goes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch


class Piece(NamedTuple):
    """Where a checkpoint tensor lies in a parameter."""

    target: str
    """The parameter."""
    expert: int | None
    """Of a stack `[E, rows, ...]`; None: the tensor is the whole parameter."""
    first: int
    """Its first row within the expert."""
    rows: int
    """Rows of the whole expert."""


class CheckpointNames:
    """What a checkpoint of `model`, saved by Transformers, calls its tensors.

    Attributes:
        mapping: for `load_external_weights`, from the names that `fused` gives.

    Raises:
        ValueError: a conversion that is neither a new name nor a stack of experts.
    """

    def __init__(self, model: Any) -> None:
        self._pieces = _pieces(model)
        self._parts: dict[str, dict[int, str]] = {}
        for name, piece in self._pieces.items():
            self._parts.setdefault(_fused_name(name, piece), {})[piece.first] = name
        self._waiting: dict[str, dict[int, torch.Tensor]] = {}
        self.mapping = {_fused_name(n, p): _place(p) for n, p in self._pieces.items()}

    def fused(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The checkpoint's tensors, parts of an expert joined once all have come."""
        for name, tensor in weights:
            piece = self._pieces.get(name)
            if piece is None or piece.expert is None:
                yield name, tensor
                continue
            key = _fused_name(name, piece)
            parts = self._waiting.setdefault(key, {})
            parts[piece.first] = tensor
            if sum(len(part) for part in parts.values()) >= piece.rows:
                del self._waiting[key]
                yield key, torch.cat([parts[first] for first in sorted(parts)])

    def split(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The inverse of `fused`: what `mapping` exports, as the checkpoint has it."""
        for key, tensor in weights:
            parts = self._parts[key]
            if list(parts.values()) == [key]:
                yield key, tensor
                continue
            firsts = sorted(parts)
            for first, end in zip(firsts, [*firsts[1:], len(tensor)], strict=True):
                yield parts[first], tensor[first:end]


class SavedByTransformers:
    """Loads and exports the parameters of `model` as Transformers saves them.

    Attributes:
        model: the Transformers model.
    """

    model: Any

    @cached_property
    def names(self) -> CheckpointNames:
        """What a checkpoint calls the model's tensors."""
        return CheckpointNames(self.model)

    def load_weights(self, weights_iter: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint under the names that Transformers saves it with.

        Raises:
            WeightError: a tensor is missing or has another shape.
        """
        from vllm_graft.weights.load import load_external_weights

        stream = self.names.fused(weights_iter)
        report = load_external_weights(self.model, stream, self.names.mapping).report
        return {f"model.{name}" for name in report.loaded.values()}

    def split_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Take apart again what `load_weights` joins; `Contents` exports through it."""
        return self.names.split(weights)


def _fused_name(name: str, piece: Piece) -> str:
    return name if piece.expert is None else f"{piece.target}.{piece.expert}"


def _place(piece: Piece) -> str:
    return piece.target if piece.expert is None else f"{piece.target}[{piece.expert}]"


def _pieces(model: Any) -> dict[str, Piece]:
    from transformers.core_model_loading import revert_weight_conversion

    tensors = model.state_dict()
    starts, numbers, count = [], {}, 0
    for name, tensor in tensors.items():
        starts.append(count)
        rows = tensor.shape[:-1] if tensor.dim() > 1 else tensor.shape
        own = torch.arange(count, count + rows.numel()).view(rows)
        # Two columns: Transformers squeezes, and a transposed tensor must look transposed.
        numbers[name] = own[..., None].expand(*rows, 2) if tensor.dim() > 1 else own
        count += max(rows.numel(), 1)
    targets = list(tensors)
    pieces = {}
    for saved, found in revert_weight_conversion(model, dict(numbers)).items():
        index = bisect_right(starts, int(found.flatten()[0])) - 1
        target = targets[index]
        pieces[saved] = _piece(saved, target, numbers[target], found)
    return pieces


def _piece(saved: str, target: str, numbers: torch.Tensor, found: torch.Tensor) -> Piece:
    if torch.equal(found, numbers):
        return Piece(target, None, 0, len(numbers) if numbers.dim() else 1)
    if numbers.dim() == 3:
        rows = numbers.shape[1]
        expert, first = divmod(int(found.flatten()[0] - numbers.flatten()[0]), rows)
        if torch.equal(found, numbers[expert, first : first + len(found)]):
            return Piece(target, expert, first, rows)
    raise ValueError(
        f"{saved}: Transformers converts it into {target} by more than a new name or a stack of "
        "experts, which Graft cannot load; save the checkpoint with save_original_format=False"
    )
