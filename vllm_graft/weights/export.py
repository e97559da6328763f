"""`export_weights`: a model's tensors under their checkpoint names, the mapping read backwards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from vllm_graft.products import restore_weights
from vllm_graft.stage import other_stages
from vllm_graft.weights.errors import WeightError
from vllm_graft.weights.mapping import Entry, NameMap, NameMapping, Place, label
from vllm_graft.weights.rows import Part, part_of, rows_in
from vllm_graft.weights.shards import rows_of, whole, whole_shape
from vllm_graft.weights.slots import Slot, slots, tensor_in, tied_names


def export_weights(
    model: nn.Module, name_mapping: NameMapping
) -> Iterator[tuple[str, torch.Tensor]]:
    """The inverse of `load_external_weights`, by the same mapping.

    Args:
        model: plain, DTensor or tensor-parallel local parameters. What is sharded is
            gathered, so every rank must consume the iterator to its end. A pipeline
            stage exports what it holds.
        name_mapping: the mapping that loads a checkpoint into the model.

    Returns:
        `(checkpoint name, tensor)`, one at a time: every parameter, and the buffers that the
        mapping names. Stacks come row by row, `Rows` apart, `RowOrder` is undone, dropped names are
        absent. A tied parameter comes once, under the name that stands first in the
        mapping. Tensors keep the model's dtype and device and are detached; without
        a `RowOrder` or DTensor they share the model's memory.

    Raises:
        WeightError: at the call, for a mapping that cannot be reversed: a parameter or a row
            that no entry fills, or several do, or whose checkpoint name would load elsewhere.
    """
    names = NameMap(name_mapping)
    names.check_targets(slots(model), (f"{place}." for place in other_stages(model)))
    plans = _plans(model, names)
    restore_weights(model)
    return (exported for plan in plans for exported in plan.tensors())


def exported_shapes(
    model: nn.Module, name_mapping: NameMapping
) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """What `export_weights` would yield, by name and in its order; nothing is gathered.

    Raises:
        WeightError: as `export_weights` does.
    """
    names = NameMap(name_mapping)
    names.check_targets(slots(model))
    return {
        name: (tensor_in(plan.slot).dtype, part_of(_on_meta(plan.slot), row).shape)
        for plan in _plans(model, names)
        for row, (name, _) in plan.pieces.items()
    }


def _on_meta(slot: Slot) -> torch.Tensor:
    return torch.empty(whole_shape(tensor_in(slot)), device="meta")


@dataclass(frozen=True)
class _Plan:
    """How one tensor of the model leaves it."""

    slot: Slot
    pieces: dict[Part, tuple[str, Entry]]
    """By part (None: all of it): the checkpoint name, and the entry that it follows."""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        full = whole(tensor_in(self.slot))
        for row, (name, entry) in self.pieces.items():
            piece = part_of(full, row)
            yield name, piece if entry.order is None else entry.order.undo(piece)


def _plans(model: nn.Module, names: NameMap) -> list[_Plan]:
    known, first = slots(model), tied_names(model)
    parameters = {name for name, _ in model.named_parameters()}
    aliases: dict[str, list[str]] = {}
    for name, slot in known.items():
        aliases.setdefault(first[slot], []).append(name)
    plans = [_plan(known, tied, names) for tied in aliases.values()]
    for name, plan in zip(aliases, plans, strict=True):
        if plan is None and name in parameters:
            raise WeightError(
                f"parameter {name!r}: no entry of name_mapping names it, so it cannot be exported"
            )
    return [plan for plan in plans if plan is not None]


def _plan(known: dict[str, Slot], tied: list[str], names: NameMap) -> _Plan | None:
    """The plan for a tensor with the names `tied`; None if no entry names it."""
    tensor = tensor_in(known[tied[0]])
    size = rows_of(tensor)
    filled = {name: names.sources_of(name, size) for name in tied}
    ranks = {
        min(names.entries.index(entry) for entries in by_row.values() for entry in entries): name
        for name, by_row in filled.items()
        if by_row
    }
    if not ranks:
        return None
    name = ranks[min(ranks)]
    _check(name, filled[name], size)
    pieces = {row: (e.source_of(name, row), e) for row, (e,) in filled[name].items()}
    for row, (source, entry) in pieces.items():
        _check_back(names, source, Place(name, row, entry.order))
    return _Plan(known[name], pieces)


def _check(name: str, by_row: dict[Part, list[Entry]], size: int) -> None:
    """Every row is filled by one entry, or all of the tensor is."""
    rows = rows_in(by_row)
    twice = None not in by_row and len(rows) != sum(len(rows_in([part])) for part in by_row)
    for row, entries in by_row.items():
        if len(entries) > 1 or twice or (row is None and len(by_row) > 1):
            several = [e.source for found in by_row.values() for e in found]
            raise WeightError(
                f"{label(name, row)!r}: name_mapping fills it from "
                f"{' and '.join(map(repr, dict.fromkeys(several)))}, so it cannot be reversed; "
                "keep one entry, or map the other name to None"
            )
    absent = [] if None in by_row else [row for row in range(size) if row not in rows]
    if absent:
        raise WeightError(
            f"{label(name, absent[0])!r}: no entry of name_mapping names it, and {len(absent)} "
            f"of {size} rows in all; map every row, with `[{{}}]` or `Rows`"
        )


def _check_back(names: NameMap, source: str, place: Place) -> None:
    """An exported name must load to where it came from: an earlier entry may take it."""
    back = names(source)
    if back != place:
        taken = "not at all" if back is None or back.target is None else f"to {str(back)!r}"
        raise WeightError(
            f"{str(place)!r} would be exported as {source!r}, which name_mapping loads {taken}; "
            "an earlier or exact entry takes that name"
        )
