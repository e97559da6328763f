"""`torch.einsum` as a model writes attention with it, brought to the order of a product.

Legend: B sequences, N heads, L length, H head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

_DOTS = "YZ"
"""What `...` stands for; a model that uses these letters too gives no product."""


class Product(NamedTuple):
    """`left @ right^T` with what to do to the operands before it and to the result after it."""

    left: str
    """The first operand's letters."""
    right: str
    out: str
    shared: str
    """Letters of both operands and of the result: B and N, in the order of the result."""
    row: str
    """The letter of the first operand alone."""
    column: str
    """The letter of the second operand alone."""
    summed: str

    def of_scores(self) -> bool:
        """Whether it has the form of `q @ k^T`, rows of the first operand before columns."""
        return self.out == self.shared + self.row + self.column

    def swapped(self) -> Product:
        """The same with its operands exchanged."""
        return Product(
            self.right, self.left, self.out, self.shared, self.column, self.row, self.summed
        )

    def rows(self, left: torch.Tensor) -> torch.Tensor:
        """The first operand as `[B, N, L, H]`."""
        return _ordered(left, self.left, self.shared + self.row + self.summed)

    def columns(self, right: torch.Tensor) -> torch.Tensor:
        """The second operand as `[B, N, L, H]`."""
        return _ordered(right, self.right, self.shared + self.column + self.summed)

    def values(self, right: torch.Tensor) -> torch.Tensor:
        """The second operand as `[B, N, L, H]`, where its L is summed over."""
        return _ordered(right, self.right, self.shared + self.summed + self.column)

    def result(self, out: torch.Tensor) -> torch.Tensor:
        """`[B, N, L, H]` in the order that the equation asks for."""
        return _ordered(out, self.shared + self.row + self.column, self.out)


def read(equation: str, dims: Sequence[int]) -> Product | None:
    """The product that an equation of two operands describes; None for another one.

    Args:
        equation: as `torch.einsum` takes it, with `->`.
        dims: of each operand.
    """
    inputs, _, out = equation.replace(" ", "").partition("->")
    operands = inputs.split(",")
    if len(operands) != 2 or len(dims) != 2:
        return None
    unnamed = _DOTS[: dims[0] - len(operands[0].replace("...", ""))]
    left, right, out = (terms.replace("...", unnamed) for terms in (*operands, out))
    both = set(left) & set(right)
    shared = "".join(letter for letter in out if letter in both)
    alone = [set(left) - both, set(right) - both, both - set(out)]
    sizes = {*dims, len(left), len(set(left)), len(right), len(set(right)), len(out)}
    if sizes != {len(shared) + 2} or any(len(letters) != 1 for letters in alone):
        return None
    row, column, summed = (letters.pop() for letters in alone)
    return Product(left, right, out, shared, row, column, summed)


def _ordered(x: torch.Tensor, letters: str, wanted: str) -> torch.Tensor:
    return x.permute([letters.index(letter) for letter in wanted])
