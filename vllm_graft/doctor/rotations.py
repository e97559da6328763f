"""Faults of rotary embeddings, corrected at the seam: turned back as they were, then aright.

Needs no access to the model's own RoPE: what reaches `CoreAttention` is rotated already, and a
rotation can be undone. Covers rotations of the whole head. Legend as in `attention.core`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vllm_graft.attention.core import CoreAttention
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


def rotations(model: nn.Module, theta: float) -> Iterator[Correction]:
    """Every hypothesis about rotary embeddings.

    Args:
        model: the adapted one.
        theta: `rope_theta` of the checkpoint.
    """
    found = seams(model)
    if not found:
        return
    name, cores = found[0][0], [core for _, core in found]
    for style in _STYLES:
        other = _STYLES[style == _STYLES[0]]
        right = Rope(style, theta)
        yield _correction(
            "RoPE: interleaved against half-split", name, cores, (Rope(other, theta), right)
        )
        for wrong in THETAS:
            if wrong != theta:
                pair = (Rope(style, wrong), right)
                yield _correction("wrong RoPE theta", name, cores, pair)
        for shift in (-1, 1):
            for both in (False, True):
                pair = (Rope(style, theta, shift), right)
                which = (not both, both)
                yield _correction("off-by-one positions", name, cores, pair, which)


def _correction(
    fault: str,
    name: str,
    cores: list[CoreAttention],
    pair: tuple[Rope, Rope],
    which: tuple[bool, bool] = (True, True),
) -> Correction:
    wrong, right = pair
    return Correction(fault, name, _say(wrong), _say(right), lambda: _turned(cores, pair, which))


def _say(rope: Rope) -> str:
    shift = f", positions {rope.shift:+d}" if rope.shift else ""
    return f"{rope.style}, theta {rope.theta:g}{shift}"


@contextmanager
def _turned(
    cores: list[CoreAttention], pair: tuple[Rope, Rope], which: tuple[bool, bool]
) -> Iterator[None]:
    wrong, right = pair

    def again(x: torch.Tensor) -> torch.Tensor:
        batch = current_batch()
        if batch is None:
            raise RuntimeError("the doctor's rotations need a batch; run inside packed(...)")
        return right.turn(wrong.turn(x, batch.positions, -1), batch.positions, 1)

    def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
        q, k, *rest = args
        return (again(q) if which[0] else q, again(k) if which[1] else k, *rest), kwargs

    with ExitStack() as stack:
        for core in cores:
            handle = core.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield
