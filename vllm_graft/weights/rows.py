"""`RowOrder` and `Rows`: parameters whose rows are not simply those of one checkpoint tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from vllm_graft.weights.errors import WeightError

Part = int | tuple[int, ...] | None
"""Of a tensor's dim 0: one row, several in this order, or (None) all of it."""


def rows_in(parts: Iterable[Part]) -> set[int]:
    """The rows in several parts, of which none is None."""
    found: set[int] = set()
    for part in parts:
        found.update(part if isinstance(part, tuple) else () if part is None else (part,))
    return found


def part_of(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    """A part of `tensor`: `[...]` without dim 0 for one row, `[rows, ...]` copied for several."""
    if part is None:
        return tensor
    return tensor[list(part)] if isinstance(part, tuple) else tensor[part]


@dataclass(frozen=True)
class Rows:
    """A value of `name_mapping`: the tensor is some rows (dim 0) of a fused parameter.

    Several entries fill one parameter, each its own rows, as gate and up of a fused
    product. Together they must fill all rows. Export takes them apart again.

    Args:
        target: model name, as any value of the mapping (`{}` included).
        rows: different rows of the model, ints or a LongTensor:
            `model_rows[rows] = checkpoint_rows`.

    Raises:
        WeightError: a row that stands in `rows` twice, or is negative, or none at all.
    """

    target: str
    rows: Sequence[int] | torch.Tensor

    def __post_init__(self) -> None:
        listed = self.rows.tolist() if isinstance(self.rows, torch.Tensor) else self.rows
        rows = tuple(int(row) for row in listed)
        object.__setattr__(self, "rows", rows)
        if not rows or min(rows) < 0 or len(set(rows)) != len(rows):
            raise WeightError(
                f"Rows of {self.target!r}: expected different rows from 0 on, got {len(rows)} of "
                f"which {len(set(rows))} are different, the lowest {min(rows, default=None)}"
            )


@dataclass(frozen=True)
class RowOrder:
    """A value of `name_mapping`: rename, and put the rows (dim 0) into another order.

    Args:
        target: model name, as any value of the mapping (`{}` and `[{}]` included).
        order: a permutation of the rows, ints or a LongTensor `[rows]`:
            `model_rows = checkpoint_rows[order]`. Export undoes it.

    Raises:
        WeightError: `order` is no permutation of `0..rows-1`.
    """

    target: str
    order: Sequence[int] | torch.Tensor

    def __post_init__(self) -> None:
        listed = self.order.tolist() if isinstance(self.order, torch.Tensor) else self.order
        order = tuple(int(row) for row in listed)
        object.__setattr__(self, "order", order)
        if sorted(order) != list(range(len(order))):
            raise WeightError(
                f"RowOrder for {self.target!r}: order is no permutation of 0..{len(order) - 1}; "
                "each row of the checkpoint must stand in it once"
            )

    def check(self, where: str, tensor: torch.Tensor) -> None:
        """Raise if `tensor` `[rows, ...]` has another number of rows.

        Raises:
            WeightError: begins with `where`.
        """
        if tensor.dim() == 0 or tensor.shape[0] != len(self.order):
            raise WeightError(
                f"{where}: shape {tuple(tensor.shape)} has not the {len(self.order)} rows of "
                "its RowOrder; the order was made for other head counts or sizes"
            )

    def undo(self, tensor: torch.Tensor) -> torch.Tensor:
        """Model rows `[rows, ...]` in the checkpoint's order, as a copy."""
        return tensor[self.indices.argsort().to(tensor.device)]

    @cached_property
    def indices(self) -> torch.Tensor:
        """`order` as int64: for each row of the model, that of the checkpoint."""
        return torch.tensor(self.order, dtype=torch.long)


def interleave_rope_rows(num_heads: int, nope_dim: int, rope_dim: int) -> tuple[int, ...]:
    """The order that turns half-split RoPE rows into adjacent pairs, for `RowOrder`.

    A projection's output rows are `num_heads` times `nope_dim` rows without
    RoPE and then `rope_dim` rows with it. Half-split RoPE rotates row j with row
    j + rope_dim/2 (Hugging Face's `rotate_half`), adjacent pairs rotate rows 2j and 2j + 1
    (complex tables, TorchTitan's DeepSeek V3). Rows without RoPE stay.

    Args:
        num_heads: heads in the projection; 1 for MLA's shared key (`wkv_a`).
        nope_dim: rows of a head before the RoPE rows; `kv_lora_rank` for `wkv_a`.
        rope_dim: RoPE rows of a head, even.

    Raises:
        ValueError: `rope_dim` is odd.
    """
    if rope_dim % 2:
        raise ValueError(f"rope_dim={rope_dim} is odd; RoPE rotates pairs of rows")
    half = rope_dim // 2
    pairs = [nope_dim + row for j in range(half) for row in (j, j + half)]
    head = [*range(nope_dim), *pairs]
    return tuple(h * len(head) + row for h in range(num_heads) for row in head)
