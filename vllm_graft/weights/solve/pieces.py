"""What the tensors of one side hold, fused ones taken apart: the words both sides share."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_graft.weights.errors import WeightError
from vllm_graft.weights.solve.groups import Group
from vllm_graft.weights.solve.layouts import PARTS, Heads, layouts
from vllm_graft.weights.solve.roles import roles_of

Role = tuple[str, str]
"""What a tensor is, and `weight` or `bias`."""


@dataclass(frozen=True)
class Piece:
    """A group of tensors, or some rows of each."""

    group: Group
    rows: tuple[int, ...] | None = None
    """Rows of dim 0; None: all."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one tensor's part."""
        first, *rest = self.group.shape or (0,)
        return (first if self.rows is None else len(self.rows), *rest)


def pieces_of(groups: list[Group], heads: Heads | None) -> dict[Role, Piece]:
    """The pieces of one side by role; what names do not tell is absent.

    Raises:
        WeightError: a fused tensor whose rows the heads do not explain, or whose layout is
            one of several.
    """
    found: dict[Role, Piece] = {}
    for (role, kind), group in roles_of(groups).items():
        if role not in PARTS:
            found[role, kind] = Piece(group)
            continue
        if len(group.shape) > 2:
            continue  # A stack of fused experts: not taken apart, so it stays open.
        choices = layouts(role, group.pattern, group.shape[0], heads)
        if len(choices) > 1:
            raise WeightError(
                f"{group.pattern!r}: names do not decide between its layouts "
                f"{' and '.join(map(repr, choices))}"
            )
        for part, rows in next(iter(choices.values())).items():
            found[part, kind] = Piece(group, rows)
    return found
