"""Checkpoint names to places in the model, with `{}` for layer and expert numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from vllm_graft.weights.errors import WeightError, nearest
from vllm_graft.weights.rows import Part, RowOrder, Rows

NameMapping = Mapping[str, "str | RowOrder | Rows | None"]
"""What users write: checkpoint name to model name, see `load_external_weights`."""

_INDEXED = re.compile(r"(.+)\[(\{\}|\d+)\]")


@dataclass(frozen=True)
class Place:
    """Where a checkpoint tensor goes."""

    target: str | None
    """A parameter or buffer; None: dropped on purpose."""
    row: Part = None
    """The row or rows of dim 0 that the tensor is; None: the tensor is all of it."""
    order: RowOrder | None = None

    def __str__(self) -> str:
        return label(str(self.target), self.row)


def label(name: str, row: Part) -> str:
    """A tensor, or a part of it, as the mapping writes it."""
    if isinstance(row, tuple):
        return f"{name}[{len(row)} rows from {row[0]}]"
    return name if row is None else f"{name}[{row}]"


@dataclass(frozen=True)
class Entry:
    """One line of a mapping, readable in both directions."""

    source: str
    target: str | None
    """The model pattern without its index."""
    index: str | None
    """What stands in brackets after the target: `{}`, digits or nothing."""
    order: RowOrder | None
    part: tuple[int, ...] | None = None
    """The rows of a `Rows`."""

    def place(self, name: str) -> Place | None:
        """Where the checkpoint tensor `name` goes; None: not by this entry."""
        match = self._source_regex.fullmatch(name)
        if match is None:
            return None
        if self.target is None:
            return Place(None)
        numbers = list(match.groups())
        if self.part is not None:
            return Place(_fill(self.target, numbers), self.part)
        row = numbers.pop() if self.index == "{}" else self.index
        return Place(_fill(self.target, numbers), None if row is None else int(row), self.order)

    def rows(self, target: str, size: int) -> Sequence[Part]:
        """The parts of tensor `target` that this entry fills; [None]: all `size` rows at once."""
        if self._numbers(target) is None:
            return []
        if self.part is not None:
            return [self.part]
        if self.index is None:
            return [None]
        return range(size) if self.index == "{}" else [int(self.index)]

    def source_of(self, target: str, row: Part) -> str:
        """The checkpoint name of one of `rows(target, ...)`."""
        numbers = self._numbers(target) or []
        return _fill(self.source, [*numbers, str(row)] if self.index == "{}" else numbers)

    def leads_below(self, prefix: str) -> bool:
        """Whether tensors of this entry may go to names that begin with `prefix`."""
        depth = prefix.count(".")
        words = str(self.target).split(".")
        return _regex(".".join(words[:depth]) + ".").fullmatch(prefix) is not None

    def _numbers(self, target: str) -> list[str] | None:
        match = self._target_regex and self._target_regex.fullmatch(target)
        return list(match.groups()) if match else None

    @cached_property
    def _source_regex(self) -> re.Pattern[str]:
        return _regex(self.source)

    @cached_property
    def _target_regex(self) -> re.Pattern[str] | None:
        return None if self.target is None else _regex(self.target)


class NameMap:
    """A compiled mapping; its syntax is described at `load_external_weights`.

    Raises:
        WeightError: two sides with different counts of `{}`, a `*` that does not
            drop, or a target that is no name.
    """

    def __init__(self, mapping: NameMapping) -> None:
        self.entries = [_entry(source, value) for source, value in mapping.items()]
        self._exact = {entry.source: entry for entry in self.entries}

    def __call__(self, *names: str) -> Place | None:
        """Where a tensor that goes by any of `names` goes; None: the mapping does not name it."""
        exact = (self._exact[name].place(name) for name in names if name in self._exact)
        places = (entry.place(name) for entry in self.entries for name in names)
        return next((place for place in chain(exact, places) if place is not None), None)

    def sources_of(self, target: str, size: int) -> dict[Part, list[Entry]]:
        """The entries that fill a tensor of `size` rows, by part (None: all of it)."""
        found: dict[Part, list[Entry]] = {}
        for entry in self.entries:
            for row in entry.rows(target, size):
                found.setdefault(row, []).append(entry)
        return found

    def check_targets(self, names: Iterable[str], other_stages: Iterable[str] = ()) -> None:
        """Raise if a model pattern names nothing that exists.

        Args:
            names: what the model has.
            other_stages: prefixes, with their dot, of what other pipeline stages have.

        Raises:
            WeightError: naming the entry and the nearest existing names.
        """
        known, elsewhere = list(names), list(other_stages)
        for entry in self.entries:
            if entry.target is None or any(entry.leads_below(place) for place in elsewhere):
                continue
            if not any(entry.rows(name, 1) for name in known):
                raise WeightError(
                    f"name_mapping {entry.source!r} -> {entry.target!r}: the model has no such "
                    f"parameter; {nearest(entry.target, known)}"
                )


def _entry(source: str, value: object) -> Entry:
    target = value.target if isinstance(value, (RowOrder, Rows)) else value
    where = f"name_mapping {source!r} -> {target!r}"
    if target is None:
        return Entry(source, None, None, None)
    if not isinstance(target, str):
        raise WeightError(f"{where}: expected one model name, a RowOrder, Rows or None")
    if "*" in source:
        raise WeightError(f"{where}: `*` is for dropping only; map it to None, or use {{}}")
    if source.count("{}") != target.count("{}"):
        raise WeightError(
            f"{where}: {source.count('{}')} placeholders against {target.count('{}')}; "
            "each {} is one number on both sides"
        )
    indexed = _INDEXED.fullmatch(target)
    name, index = indexed.groups() if indexed else (target, None)
    if isinstance(value, Rows):
        if index is not None:
            raise WeightError(f"{where}: Rows of one row [{index}]; name the parameter without it")
        return Entry(source, name, None, None, tuple(value.rows))
    return Entry(source, name, index, value if isinstance(value, RowOrder) else None)


def _fill(pattern: str, numbers: Iterable[str]) -> str:
    first, *rest = pattern.split("{}")
    return first + "".join(f"{n}{part}" for n, part in zip(numbers, rest, strict=True))


def _regex(pattern: str) -> re.Pattern[str]:
    special = {"{}": r"(\d+)", "*": ".*"}
    return re.compile(
        "".join(special.get(p, re.escape(p)) for p in re.split(r"(\{\}|\*)", pattern))
    )
