"""RoPE for Megatron's models by the positions of the running batch, from one float32 table.

Megatron computes cosines anew in every layer, for positions 0, 1, 2, ... A table gives the
same numbers, eager or compiled, for any positions. Imports nothing of Megatron.

Legend: T tokens, B sequences, L length, N heads, H head dim, S table rows, P rotated dims.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vllm_graft.precision import keep_table_precision
from vllm_graft.rope import rows_at


class PositionRotary(nn.Module):
    """Takes the place of Megatron's `rotary_pos_emb`; attention reads its table.

    Args:
        angles_SP: float32, one per rotated dimension, as Megatron's `get_emb` gives them.
        interleaved: whether adjacent dimensions are pairs, else the two halves.
        factor: on cosines and sines (YaRN's concentration).
        unzip: reorder adjacent pairs to halves first, as Megatron's latent attention does.
    """

    cos_sin: torch.Tensor

    def __init__(
        self, angles_SP: torch.Tensor, *, interleaved: bool, factor: float = 1.0, unzip: bool
    ) -> None:
        super().__init__()
        table = torch.cat([angles_SP.cos() * factor, angles_SP.sin() * factor], dim=-1)
        self.register_buffer("cos_sin", table, persistent=False)
        self.interleaved, self.unzip = interleaved, unzip
        keep_table_precision(self, {})

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> int:
        """What Megatron asks before it calls the module; the table needs no length."""
        return 0

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Give Megatron no angles: the attention seam rotates."""

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotate `[T, N, H]` or `[B, L, N, H]` by `positions` `[T]` (or `[B * L]`).

        Cosines and sines are rounded to the dtype of `x` first, as in Megatron.

        Raises:
            IndexError: a position outside the table.
        """
        rows = rows_at(self.cos_sin, positions).to(x.dtype)
        cos, sin = rows.view(*x.shape[:-2], 1, -1).chunk(2, dim=-1)
        width = cos.shape[-1]
        turned, rest = x[..., :width], x[..., width:]
        if self.unzip:
            turned = torch.cat([turned[..., 0::2], turned[..., 1::2]], dim=-1)
        turned = turned * cos + _quarter_turn(turned, self.interleaved) * sin
        return turned if rest.shape[-1] == 0 else torch.cat([turned, rest], dim=-1)


def _quarter_turn(x: torch.Tensor, interleaved: bool) -> torch.Tensor:
    if interleaved:
        return torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def table_of(rotary: Any, rows: int, *, unzip: bool = False) -> PositionRotary:
    """The table of one of Megatron's rotary modules.

    Args:
        rotary: `RotaryEmbedding` or `YarnRotaryEmbedding`.
        rows: S, the longest sequence served or trained.
        unzip: see `PositionRotary`.

    Raises:
        ValueError: another kind of rotary module.
    """
    check_rotary(rotary)
    with megatron_device():
        found = rotary.get_emb(rows)
    angles, factor = found if isinstance(found, tuple) else (found, 1.0)
    return PositionRotary(
        angles.flatten(1), interleaved=rotary.rotary_interleaved, factor=factor, unzip=unzip
    )


def check_rotary(rotary: Any) -> None:
    """Refuse rotary modules whose angles are more than a function of one position.

    Raises:
        ValueError: naming the class.
    """
    if isinstance(rotary, PositionRotary) or type(rotary).__name__ in (
        "RotaryEmbedding",
        "YarnRotaryEmbedding",
    ):
        return
    raise ValueError(
        f"rotary_pos_emb is Megatron's {type(rotary).__name__}; supported are RotaryEmbedding and "
        "YarnRotaryEmbedding (position_embedding_type='rope' or 'yarn')"
    )


@contextmanager
def megatron_device() -> Iterator[None]:
    """Let Megatron build where there is no CUDA: it asks `torch.cuda.current_device()`.

    In the block the answer is the CPU. With CUDA nothing is changed.
    """
    if torch.cuda.is_available():
        yield
        return
    before = torch.cuda.current_device
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore
    try:
        yield
    finally:
        torch.cuda.current_device = before
