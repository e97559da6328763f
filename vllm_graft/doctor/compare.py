"""How far two traces are apart, and where they part first. Torch only."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_graft.doctor.sides import Trace

LIMIT = 1e-4
"""Largest difference of a healthy float32 port: nats for log-probs, and relative to the largest
value for hidden states."""


@dataclass(frozen=True)
class Divergence:
    """One spot of both models."""

    role: str
    name: str
    """Of the adapted model's module."""
    error: float
    """Largest difference over the largest value of the reference."""
    value: float
    """Of the adapted model where they differ most."""
    expected: float
    """Of the reference there."""
    token: int
    """Index of that place among the tokens of all prompts."""


@dataclass(frozen=True)
class Agreement:
    """Full-vocabulary log-probs of one path against the reference's."""

    path: str
    tokens: int
    max_difference: float
    """Nats, over all tokens and the whole vocabulary."""
    greedy_equal: int
    """Tokens whose most likely successor is the reference's, or as likely within the limit."""

    @property
    def healthy(self) -> bool:
        """Whether it is within the limit and all greedy tokens are the same."""
        return self.max_difference <= LIMIT and self.greedy_equal == self.tokens


def agreement(path: str, got: torch.Tensor, want: torch.Tensor) -> Agreement:
    """Compare log-probs `[T, V]`; NaN and lost tokens count as infinitely far."""
    if got.shape != want.shape:
        raise ValueError(f"{path}: log-probs {tuple(got.shape)}, expected {tuple(want.shape)}")
    difference = (got - want).abs().nan_to_num(nan=float("inf"))
    chosen = got.nan_to_num(nan=float("-inf")).argmax(-1, keepdim=True)
    behind = want.max(-1).values - want.gather(-1, chosen)[:, 0]
    return Agreement(path, len(want), float(difference.max()), int((behind <= LIMIT).sum()))


def divergences(got: Trace, want: Trace) -> list[Divergence]:
    """Every spot that both have, in the order in which tokens pass."""
    found = []
    for role, expected in want.values.items():
        value = got.values.get(role)
        if value is None or value.shape != expected.shape:
            continue
        difference = (value - expected).abs().nan_to_num(nan=float("inf"))
        place = int(difference.argmax())
        found.append(
            Divergence(
                role=role,
                name=got.names[role],
                error=float(difference.max() / expected.abs().max()),
                value=float(value.flatten()[place]),
                expected=float(expected.flatten()[place]),
                token=place // expected.shape[-1],
            )
        )
    return found


def first(found: list[Divergence]) -> Divergence | None:
    """The first spot beyond the limit."""
    return next((each for each in found if not each.error <= LIMIT), None)
