"""What the tensors of one side hold, fused ones taken apart: the words both sides share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from vllm_graft.weights.solve.groups import Group
from vllm_graft.weights.solve.layouts import PARTS, Heads, layouts
from vllm_graft.weights.solve.roles import roles_of
from vllm_graft.weights.solve.transposed import MATRICES

Role = tuple[str, str]
"""What a tensor is, and `weight` or `bias`."""


@dataclass(frozen=True)
class Piece:
    """A group of tensors, or some rows of each."""

    group: Group
    rows: tuple[int, ...] | None = None
    """Rows of dim 0; None: all."""
    transposed: bool = False
    """The group's matrices are swapped before rows are counted."""

    @property
    def whole(self) -> tuple[int, ...]:
        """The shape of one tensor, all rows."""
        return self.group.shape[::-1] if self.transposed else self.group.shape

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one tensor's part."""
        return self.whole if self.rows is None else (len(self.rows), *self.whole[1:])


def pieces_of(
    groups: list[Group], heads: Heads | None, *, transposed: bool = False
) -> Iterator[tuple[list[str], dict[Role, Piece]]]:
    """The pieces of one side by role, once for each choice of layouts that names leave open.

    What names do not tell is absent. The texts say which layouts were chosen.

    Raises:
        WeightError: a fused tensor whose rows the heads do not explain.
    """
    found: dict[Role, Piece] = {}
    fused: dict[str, dict[str, Piece]] = {}
    for (role, kind), group in roles_of(groups).items():
        piece = Piece(group, transposed=transposed and kind == "weight" and role in MATRICES)
        if role not in PARTS:
            found[role, kind] = piece
        elif len(group.shape) < 3:  # A stack of fused experts is not taken apart: it stays open.
            fused.setdefault(role, {})[kind] = piece
    choices = [
        [(name, rows, kinds) for name, rows in _layouts(role, kinds, heads).items()]
        for role, kinds in fused.items()
    ]
    for chosen in product(*choices):
        pieces = dict(found)
        for _, rows, kinds in chosen:
            for kind, piece in kinds.items():
                for part, at in rows.items():
                    pieces[part, kind] = Piece(piece.group, at, piece.transposed)
        open_ones = zip(choices, chosen, strict=True)
        yield [name for options, (name, *_) in open_ones if len(options) > 1], pieces


def _layouts(
    role: str, kinds: dict[str, Piece], heads: Heads | None
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Layouts of a fused weight and its bias, which have one."""
    piece = next(iter(kinds.values()))
    pattern = piece.group.pattern
    found = layouts(role, pattern, piece.whole[0], heads)
    return {f"{pattern}: {name}": rows for name, rows in found.items()}
