"""Rotary position embedding on flat tokens, from a table of any common layout.

Legend: T tokens, N heads, H head dim, S table rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def convert_freqs_cis_to_real(freqs_cis: torch.Tensor) -> torch.Tensor:
    """Turn a complex RoPE table into cos|sin.

    Args:
        freqs_cis: complex `[S, H / 2]`; a real table passes through unchanged.

    Returns:
        Real `[S, H]`: the H/2 cosines, then the H/2 sines, in the precision of
        the complex parts. The pairing of dimensions stays that of the complex
        table: adjacent pairs `(2i, 2i + 1)`.
    """
    if not freqs_cis.is_complex():
        return freqs_cis
    return torch.cat([freqs_cis.real, freqs_cis.imag], dim=-1)


def whole_table(table: torch.Tensor) -> torch.Tensor:
    """The full table behind a prefix slice of it.

    A model written for training slices its table by the batch length
    (`freqs_cis[:L]`). While decoding, L is the number of tokens in the step and
    positions lie far beyond it, so the rows are read from the tensor that the
    slice is a view of. A slice that does not start at the table's first row,
    or a copy, is returned as it is.
    """
    base = table._base
    if base is None:
        return table
    same_layout = base.dim() == 2 and base.dtype == table.dtype and base.stride() == table.stride()
    if same_layout and table.storage_offset() == base.storage_offset():
        return base
    return table


def remembered_table(module: nn.Module, table: torch.Tensor) -> torch.Tensor:
    """`whole_table`, kept on `module`: compiled code cannot look behind a slice."""
    if torch.compiler.is_compiling():
        known: Any = getattr(module, "_table", None)
        return table if known is None else known
    whole = whole_table(table)
    module._table = None if whole is table else whole  # type: ignore[assignment]
    return whole


def rows_at(table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rows `[T, W]` of a table `[S, W]` at `positions` `[T]`.

    Raises:
        IndexError: a position lies outside the table. Positions are never clamped.
    """
    if not torch.compiler.is_compiling() and positions.device.type == "cpu" and positions.numel():
        low, high = int(positions.min()), int(positions.max())
        if low < 0 or high >= table.shape[0]:
            raise IndexError(
                f"RoPE: position {high if low >= 0 else low} is outside the table of "
                f"{table.shape[0]} rows; pass the model's whole table (at least "
                f"max_model_len rows), not a copy cut to the batch length and not rows that "
                f"were already gathered by position"
            )
    return table[positions]


def apply_rope(
    x_TNH: torch.Tensor, table: torch.Tensor, positions: torch.Tensor, *, interleaved: bool = True
) -> torch.Tensor:
    """Rotate heads by their positions, in float32, and return `x_TNH`'s dtype.

    Args:
        x_TNH: `[T, N, H]` queries or keys.
        table: complex `[S, H / 2]`; real cos|sin `[S, H]`; or the doubled
            cos|cos|sin|sin `[S, 2H]` of rotate-half models.
        positions: `[T]` int64.
        interleaved: pairing of a real `[S, H]` table: adjacent dimensions
            (True, as complex RoPE) or the two halves (False). Complex tables
            are always interleaved and doubled ones never.

    Raises:
        ValueError: the table's width fits no layout.
        IndexError: a position is outside the table.
    """
    head_dim = x_TNH.shape[-1]
    rows = rows_at(table, positions)
    if rows.is_complex():
        rows = convert_freqs_cis_to_real(rows)
    elif rows.shape[-1] == 2 * head_dim:
        rows = torch.cat(
            [rows[:, : head_dim // 2], rows[:, head_dim : head_dim + head_dim // 2]], -1
        )
        interleaved = False
    if rows.shape[-1] != head_dim:
        raise ValueError(
            f"RoPE: a table of width {table.shape[-1]} does not fit head_dim={head_dim}; "
            f"expected complex [S, {head_dim // 2}], real [S, {head_dim}] (cos|sin) "
            f"or real [S, {2 * head_dim}] (cos|cos|sin|sin)"
        )
    cos, sin = rows.float().unsqueeze(1).chunk(2, dim=-1)
    return _rotate(x_TNH.float(), cos, sin, interleaved).to(x_TNH.dtype)


def _rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    if interleaved:
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
