"""Checkpoint names to model names, with `{}` for layer and expert numbers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping


class WeightError(ValueError):
    """A checkpoint that does not fit the model; the text names tensors and shapes."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause with the names most like `name`, for error texts."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.3)
    return f"nearest existing: {', '.join(close)}" if close else "nothing similar exists"


class NameMap:
    """A compiled `{checkpoint pattern: model pattern}` table.

    Each `{}` stands for one number; the numbers are carried over in order.
    A model pattern of None drops the tensor on purpose.

    Raises:
        WeightError: two sides with different counts of `{}`, or a target that is no name.
    """

    def __init__(self, mapping: Mapping[str, str | None]) -> None:
        self.mapping = dict(mapping)
        self._patterns: list[tuple[re.Pattern[str], str | None]] = []
        for source, target in self.mapping.items():
            if target is not None and not isinstance(target, str):
                raise WeightError(
                    f"name_mapping {source!r} -> {target!r}: expected one model name or None"
                )
            if target is not None and source.count("{}") != target.count("{}"):
                raise WeightError(
                    f"name_mapping {source!r} -> {target!r}: {source.count('{}')} placeholders "
                    f"against {target.count('{}')}; each {{}} is one number on both sides"
                )
            self._patterns.append((_regex(source), target))

    def __call__(self, name: str) -> tuple[bool, str | None]:
        """Whether `name` is mapped, and the model name (None: dropped on purpose)."""
        if name in self.mapping:
            return True, self.mapping[name]
        for pattern, target in self._patterns:
            match = pattern.fullmatch(name)
            if match:
                return True, None if target is None else target.format(*match.groups())
        return False, None

    def check_targets(self, names: Iterable[str]) -> None:
        """Raise if a model pattern names nothing that exists.

        Raises:
            WeightError: naming the entry and the nearest existing names.
        """
        known = list(names)
        for source, target in self.mapping.items():
            if target is None:
                continue
            pattern = _regex(target)
            if not any(pattern.fullmatch(name) for name in known):
                raise WeightError(
                    f"name_mapping {source!r} -> {target!r}: the model has no such parameter; "
                    f"{nearest(target, known)}"
                )


def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(r"(\d+)".join(re.escape(part) for part in pattern.split("{}")))
