"""Faults of rotary embeddings, corrected at the seam: turned back as they were, then aright.

Needs no access to the model's own RoPE: what reaches `CoreAttention` is rotated already, and a
rotation can be undone. Covers rotations of the whole head. Legend as in `attention.core`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from vllm_graft.doctor import changes
from vllm_graft.doctor.corrections import Correction, seams
from vllm_graft.positions import current_batch

THETAS = (10_000.0, 100_000.0, 500_000.0, 1_000_000.0, 5_000_000.0, 10_000_000.0)
"""What published models use; a wrong theta is looked for among them."""
_STYLES = ("half-split", "interleaved")


@dataclass(frozen=True)
class Rope:
    """One way to rotate."""

    style: str
    theta: float
    shift: int = 0
    """Added to every position."""

    def turn(self, x: torch.Tensor, positions: torch.Tensor, sign: int) -> torch.Tensor:
        """Rotate `x` `[..., T, heads, H]` forwards (`sign` 1) or back (-1)."""
        half = x.shape[-1] // 2
        rates = self.theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = sign * torch.outer((positions + self.shift).double(), rates)
        cos, sin = angle.cos().to(x.dtype)[:, None], angle.sin().to(x.dtype)[:, None]
        if self.style == "half-split":
            one, two = x[..., :half], x[..., half:]
            return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)
        one, two = x[..., ::2], x[..., 1::2]
        return torch.stack([one * cos - two * sin, two * cos + one * sin], -1).flatten(-2)


def rotations(model: nn.Module, thetas: Sequence[float]) -> Iterator[Correction]:
    """Every hypothesis about rotary embeddings.

    Args:
        model: the adapted one.
        thetas: `rope_theta` of the checkpoint, for each `CoreAttention`.
    """
    name = seams(model)[0][0]
    cores = [core for _, core in seams(model)]

    def correction(
        fault: str, wrong: Sequence[Rope], right: Sequence[Rope], which: tuple[bool, bool]
    ) -> Correction:
        turns = list(zip(cores, wrong, right, strict=True))
        pairs = zip(wrong, right, strict=True)
        found, expected = next(pair for pair in pairs if pair[0] != pair[1])
        change = partial(_turned, turns, which)
        return Correction(fault, name, _say(found), _say(expected), change)

    for style in _STYLES:
        right = [Rope(style, theta) for theta in thetas]
        other = [Rope(_STYLES[style == _STYLES[0]], theta) for theta in thetas]
        yield correction("RoPE: interleaved against half-split", other, right, (True, True))
        for wrong in THETAS:
            if set(thetas) != {wrong}:
                same = [Rope(style, wrong)] * len(thetas)
                yield correction("wrong RoPE theta", same, right, (True, True))
        for shift in (-1, 1):
            moved = [Rope(style, theta, shift) for theta in thetas]
            for which in ((True, False), (False, True)):
                yield correction("off-by-one positions", moved, right, which)


def _say(rope: Rope) -> str:
    shift = f", positions {rope.shift:+d}" if rope.shift else ""
    return f"{rope.style}, theta {rope.theta:g}{shift}"


@contextmanager
def _turned(
    turns: Sequence[tuple[nn.Module, Rope, Rope]], which: tuple[bool, bool]
) -> Iterator[None]:
    with ExitStack() as stack:
        for core, wrong, right in turns:
            stack.enter_context(changes.before(core, partial(_again, wrong, right, which)))
        yield


def _again(
    wrong: Rope, right: Rope, which: tuple[bool, bool], _: nn.Module, args: Any, kwargs: Any
) -> Any:
    batch = current_batch()
    if batch is None:
        raise RuntimeError("the doctor's rotations need a batch; run inside packed(...)")
    turned = [
        right.turn(wrong.turn(x, batch.positions, -1), batch.positions, 1) if chosen else x
        for x, chosen in zip(args[:2], which, strict=True)
    ]
    return (*turned, *args[2:]), kwargs
