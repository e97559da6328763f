"""The tensors of one side, those of all layers and experts as one group."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class Group:
    """Tensors that differ only in the numbers of their names, all of one shape."""

    pattern: str
    """With `{}` for each number."""
    numbers: frozenset[tuple[str, ...]]
    shape: tuple[int, ...]

    @property
    def depth(self) -> int:
        """Numbers in the name."""
        return self.pattern.count("{}")

    def names(self) -> list[str]:
        """All names."""
        return [self.pattern.format(*n) for n in sorted(self.numbers)]


def groups_of(shapes: Mapping[str, tuple[int, ...]]) -> list[Group]:
    """Group names to shapes; numbers of places in a Sequential stay in the name."""
    lists = _lists(shapes)
    found: dict[str, dict[tuple[str, ...], tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        pattern, numbers = _split(name, lists)
        found.setdefault(pattern, {})[numbers] = shape
    groups = []
    for pattern, members in found.items():
        if len(set(members.values())) == 1:
            shape = next(iter(members.values()))
            groups.append(Group(pattern, frozenset(members), shape))
        else:
            # Layers of different sizes: each tensor by its own name.
            groups += [
                Group(pattern.format(*n), frozenset({()}), shape) for n, shape in members.items()
            ]
    return groups


def _lists(shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """Prefixes whose numbered children are alike: layers, experts."""
    children: dict[str, dict[str, set[str]]] = {}
    for name in shapes:
        for match in _NUMBER.finditer(name):
            prefix, rest = name[: match.start()], name[match.end() :]
            children.setdefault(prefix, {}).setdefault(match[0], set()).add(rest)
    # The places of a Sequential: few, and one tensor name each (weight, bias).
    return {
        prefix
        for prefix, by_number in children.items()
        if any(rest.count(".") > 1 for rests in by_number.values() for rest in rests)
    }


def _split(name: str, lists: set[str]) -> tuple[str, tuple[str, ...]]:
    pattern, numbers, end = "", [], 0
    for match in _NUMBER.finditer(name):
        if name[: match.start()] in lists:
            pattern += name[end : match.start()] + "{}"
            numbers.append(match[0])
            end = match.end()
    return pattern + name[end:], tuple(numbers)
