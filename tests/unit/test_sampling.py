"""Sampling parameters in the gradient: the sampler's bits, the slopes of what it computes."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_graft.train.sampling import with_gradient

VOCAB = 11
SEEN = ((0, 3, 3, 7), (1,), ())
"""Tokens of prompt and completion so far, row by row."""


def parameters(**given: Any) -> Any:
    neutral = {"temperature": 1.0, "repetition_penalty": 1.0, "logit_bias": None}
    return SimpleNamespace(**{**neutral, **given})


def written_out(
    logits: torch.Tensor, params: Sequence[Any], seen: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Bias, repetition penalty, temperature, in the sampler's order, by autograd."""
    rows = []
    for row, p, tokens in zip(logits, params, seen, strict=True):
        bias = torch.zeros_like(row)
        for token, value in (p.logit_bias or {}).items():
            bias[token] = value
        x, r = row + bias, p.repetition_penalty
        penal = torch.zeros(VOCAB, dtype=torch.bool)
        penal[list(tokens)] = True
        x = torch.where(penal, torch.where(x > 0, x / r, x * r), x)
        rows.append(x / p.temperature if p.temperature > 0 else x)
    return torch.stack(rows)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 0.0},
        {"repetition_penalty": 1.8, "temperature": 1.3},
        # Token 3 is below zero without its bias and above with it, token 7 the other way round.
        {"repetition_penalty": 1.8, "logit_bias": {3: 4.0, 7: -4.0}},
    ],
    ids=str,
)
def test_values_are_the_samplers_and_slopes_those_of_its_arithmetic(given):
    logits = torch.randn(len(SEEN), VOCAB, generator=torch.Generator().manual_seed(0))
    logits[0, 3], logits[0, 7] = -1.0, 1.0
    params = [parameters(**given) for _ in SEEN]
    weights = torch.arange(1.0, 1 + len(SEEN))

    expected = logits.double().requires_grad_()
    right = written_out(expected, params, SEEN)
    removed = right < right.topk(6).values[:, -1:]
    right = right.masked_fill(removed, float("-inf"))
    processed = right.detach().float()
    (right.log_softmax(-1).max(-1).values * weights).sum().backward()

    leaf = logits.clone().requires_grad_()
    out = with_gradient(leaf, processed, params, SEEN)
    assert torch.equal(out, processed)
    (out.log_softmax(-1).max(-1).values * weights).sum().backward()
    assert leaf.grad is not None and expected.grad is not None
    assert leaf.grad[removed].abs().max() == 0
    # One rounding of float32 in each factor.
    torch.testing.assert_close(leaf.grad.double(), expected.grad, rtol=1e-5, atol=1e-6)
    assert leaf.grad.abs().max() > 0.1
