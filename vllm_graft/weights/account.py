"""The account of one load: what came, where it went, and what is missing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from vllm_graft.weights.errors import nearest
from vllm_graft.weights.mapping import Entry, NameMap, label
from vllm_graft.weights.rows import Part, rows_in
from vllm_graft.weights.slots import Slot

_SHOWN = 40


@dataclass
class LoadReport:
    """Where every checkpoint tensor and every model parameter ended up."""

    loaded: dict[str, str] = field(default_factory=dict)
    """Checkpoint name to what it was written to: a parameter, or rows of one (`w[3]`)."""
    skipped: list[str] = field(default_factory=list)
    """Checkpoint names that the mapping does not name."""
    dropped: list[str] = field(default_factory=list)
    """Checkpoint names that the mapping drops on purpose (maps to None)."""
    elsewhere: list[str] = field(default_factory=list)
    """Checkpoint names whose place another pipeline stage holds (`OtherStage`)."""
    missing: list[str] = field(default_factory=list)
    """Parameters, buffers that the mapping names, and rows left without a value."""
    numel: int = 0
    """Numbers written."""

    def __str__(self) -> str:
        others = f"{len(self.elsewhere)} on other stages, " if self.elsewhere else ""
        lines = [
            f"{len(self.loaded)} tensors loaded ({self.numel:,} numbers), {others}"
            f"{len(self.skipped)} skipped, {len(self.dropped)} dropped on purpose, "
            f"{len(self.missing)} parameters missing"
        ]
        for title in ("skipped", "dropped", "missing"):
            lines += [f"  {title}: {name}" for name in getattr(self, title)]
        return "\n".join(lines)


@dataclass(frozen=True)
class Missing:
    """A tensor, or a part of it, without a value."""

    name: str
    row: Part = None
    hint: str = ""
    """What the mapping says it would come from, and how much of it came."""

    def __str__(self) -> str:
        return label(self.name, self.row)


@dataclass
class _Tensor:
    """What a load may fill, and the rows it did."""

    size: int
    """Rows (dim 0)."""
    local: str
    """Its name in the model that the mapping is for."""
    names: NameMap
    required: bool
    """A parameter: it must get a value, whether the mapping names it or not."""
    sources: dict[Part, tuple[str, str]] = field(default_factory=dict)
    """By part (None: all of it): the checkpoint name, and the target as the mapping named it."""

    def entries(self) -> dict[Part, list[Entry]]:
        """The entries of the mapping that fill it, by part."""
        return self.names.sources_of(self.local, self.size)


class Account:
    """What one load has written so far, over all its calls.

    Args:
        names: one name for every slot, from `tied_names` of the whole model.
    """

    def __init__(self, names: dict[Slot, str]) -> None:
        self._names = names
        self._tensors: dict[str, _Tensor] = {}

    def name_of(self, slot: Slot, otherwise: str) -> str:
        """The name under which the tensor in `slot` is accounted for."""
        return self._names.get(slot, otherwise)

    def open(self, name: str, size: int, local: str, names: NameMap, *, required: bool) -> None:
        """Note a tensor of `size` rows that a mapping may fill."""
        new = _Tensor(size, local, names, required)
        known = self._tensors.setdefault(name, new)
        if not known.entries():
            # Tied tensors and submodules: the first mapping seen need not name it.
            known.local, known.names = local, names
        known.required |= required

    def earlier(self, name: str, row: Part) -> tuple[str, str] | None:
        """What was already written to any of these rows: checkpoint name and target."""
        sources = self._tensors[name].sources
        if row is None:
            return next(iter(sources.values()), None)
        known = sources.get(row) or sources.get(None)
        if known is not None or not any(isinstance(part, tuple) for part in (row, *sources)):
            return known
        rows = rows_in([row])
        shared = (part for part in sources if not rows.isdisjoint(rows_in([part])))
        return next((sources[part] for part in shared), None)

    def note(self, name: str, row: Part, source: str, target: str) -> None:
        """Note that checkpoint tensor `source` was written to this row."""
        self._tensors[name].sources[row] = (source, target)

    def rows(self, name: str) -> set[Part]:
        """The parts written of a tensor; None stands for all of it."""
        return set(self._tensors[name].sources) if name in self._tensors else set()

    def maps(self, name: str) -> bool:
        """Whether a mapping names this tensor."""
        return name in self._tensors and bool(self._tensors[name].entries())

    def missing(self) -> list[Missing]:
        """Parameters, and buffers that a mapping names, without a value in all rows."""
        return [
            gap
            for name, tensor in self._tensors.items()
            if tensor.required or tensor.entries()
            for gap in self.gaps(name, tensor.size, set(tensor.sources))
        ]

    def gaps(self, name: str, size: int, written: set[Part]) -> list[Missing]:
        """What is missing of a tensor of `size` rows of which `written` are there."""
        there = rows_in(written)
        if None in written or len(there) == size > 0:
            return []
        sources = self._sources_of(name)
        if not written:
            return [Missing(name, None, _expected(sources, None))]
        came = f"{len(there)} of {size} rows came; "
        planned = [part for part in sources or () if part is not None]
        others = set(range(size)) - rows_in(planned)
        return [
            Missing(name, part, _expected(sources, part) + came)
            for part in (*planned, *sorted(others))
            if not rows_in([part]) <= there
        ]

    def _sources_of(self, name: str) -> dict[Part, str] | None:
        """The checkpoint names of the parts; None for what `load_external_weights` never saw."""
        if name not in self._tensors:
            return None
        tensor = self._tensors[name]
        entries = tensor.entries().items()
        return {row: first.source_of(tensor.local, row) for row, (first, *_) in entries}


def _expected(sources: dict[Part, str] | None, row: Part) -> str:
    if sources is None:
        return ""
    if not sources:
        return "no entry of name_mapping names it; "
    return f"expected from {sources.get(row, next(iter(sources.values())))!r}; "


def missing_text(missing: list[Missing], skipped: Iterable[str]) -> str:
    """The error for what has no value, with what the checkpoint offers instead."""
    count = "1 parameter was" if len(missing) == 1 else f"{len(missing)} parameters were"
    lines = [f"{count} left without a value:"]
    # Layers and experts repeat: their patterns are few, and are what a mapping is written in.
    patterns = list(dict.fromkeys(re.sub(r"\d+", "{}", name) for name in skipped))
    lines += [
        f"  {gap} ({gap.hint}checkpoint tensors not mapped: {nearest(str(gap), patterns)})"
        for gap in missing[:_SHOWN]
    ]
    if len(missing) > _SHOWN:
        lines.append(f"  ... and {len(missing) - _SHOWN} more")
    return "\n".join(lines)
