"""Gradients of the port against the reference's, weight by weight. Torch only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from vllm_graft.doctor.anatomy import embedding, head, layers
from vllm_graft.doctor.sides import Adapted, ModuleReference, Prompts, evaluating

GRADIENT_LIMIT = 1e-4
"""Largest difference over the largest value of the reference's gradient, in float32."""


@dataclass(frozen=True)
class Gradient:
    """One weight that both models have."""

    name: str
    """Of the adapted model's parameter."""
    error: float
    """Largest difference over the largest value of the reference's gradient."""

    @property
    def healthy(self) -> bool:
        """Whether it is within the limit."""
        return self.error <= GRADIENT_LIMIT


def gradients(adapted: Adapted, reference: ModuleReference, prompts: Prompts) -> list[Gradient]:
    """Compare the gradients of the prompts' mean negative log-probability.

    Weights are compared where both models have one of the same role and shape; what one of them
    fuses is left out. No `.grad` is touched.
    """
    mine, theirs = dict(_weights(adapted.module)), dict(_weights(reference.module))
    both = [r for r, (_, w) in mine.items() if r in theirs and w.shape == theirs[r][1].shape]
    got = _gradients(adapted, [mine[role][1] for role in both], prompts)
    want = _gradients(reference, [theirs[role][1] for role in both], prompts)
    return [
        Gradient(mine[role][0], _relative(one, two))
        for role, one, two in zip(both, got, want, strict=True)
    ]


def _weights(model: nn.Module) -> Iterator[tuple[str, tuple[str, torch.Tensor]]]:
    whole = {"embedding": embedding(model), "head": head(model)}
    for index, layer in enumerate(layers(model)):
        whole |= {f"layer {index} {role}": part for role, part in layer.parts.items()}
    seen: set[torch.Tensor] = set()
    for role, found in whole.items():
        weight = None if found is None else getattr(found[1], "weight", None)
        if found is None or not isinstance(weight, torch.Tensor) or not weight.requires_grad:
            continue
        if weight not in seen:  # a tied head is the embedding
            seen.add(weight)
            yield role, (f"{found[0]}.weight", weight)


def _gradients(
    side: Adapted | ModuleReference, weights: list[torch.Tensor], prompts: Prompts
) -> list[torch.Tensor]:
    following = torch.tensor([t for p in prompts for t in (*p[1:], -100)])
    with torch.enable_grad(), evaluating(side.module):
        loss = nn.functional.cross_entropy(side.logits(prompts), following)
        found = torch.autograd.grad(loss, weights, allow_unused=True)
    return [
        torch.zeros_like(w) if gradient is None else gradient.detach().float()
        for w, gradient in zip(weights, found, strict=True)
    ]


def _relative(got: torch.Tensor, want: torch.Tensor) -> float:
    largest = want.abs().max().clamp(min=torch.finfo(want.dtype).tiny)
    return float(((got - want).abs().max() / largest).nan_to_num(nan=float("inf")))
