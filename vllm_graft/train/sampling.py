"""Sampling parameters inside the gradient: vLLM's values, differentiated. Torch only.

Legend: C rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

UNSUPPORTED = {
    "min_tokens": 0,
    "bad_words": None,
    "allowed_token_ids": None,
    "structured_outputs": None,
    "thinking_token_budget": None,
    "watermarking": None,
    "extra_args": None,
}
"""Fields of SamplingParams that change processed log-probabilities in ways not mirrored
here, with the values that change nothing."""


def refuse_unsupported(params: Any) -> None:
    """Raise for sampling parameters whose effect on log-probabilities is not mirrored.

    Raises:
        ValueError: naming the field, its value and the value that works.
    """
    for name, neutral in UNSUPPORTED.items():
        value = getattr(params, name, neutral)
        if value not in (neutral, [], {}):
            raise ValueError(
                f"token_logprobs: {name}={value!r} with processed log-probabilities is not "
                f"mirrored; use {name}={neutral!r} or logprobs_mode='raw_logprobs'"
            )


def with_gradient(
    logits: torch.Tensor,
    processed: torch.Tensor,
    params: Sequence[Any],
    seen: Sequence[Sequence[int]],
) -> torch.Tensor:
    """`processed`, bit for bit, as a differentiable function of `logits`.

    Penalties and bias are constants; temperature and the repetition penalty are slopes.

    Args:
        logits: `[C, V]` of the model.
        processed: `[C, V]` float32, what vLLM's sampler made of them.
        params: C `vllm.SamplingParams`.
        seen: per row the tokens that a repetition penalty falls on.

    Returns:
        `[C, V]` float32.
    """
    removed = processed.isneginf()
    smooth = logits.float() * _slopes(logits, params, seen)
    values = processed.masked_fill(removed, 0.0)
    return (values + (smooth - smooth.detach())).masked_fill(removed, float("-inf"))


@torch.no_grad()
def _slopes(
    logits: torch.Tensor, params: Sequence[Any], seen: Sequence[Sequence[int]]
) -> torch.Tensor:
    # Bias comes before the repetition penalty and may change the sign that decides about it.
    slopes = torch.ones_like(logits, dtype=torch.float32)
    for row, (p, tokens) in enumerate(zip(params, seen, strict=True)):
        if p.repetition_penalty != 1.0:
            index = torch.tensor(sorted(set(tokens)), dtype=torch.long, device=logits.device)
            biased = logits[row].to(torch.float32, copy=True)
            for token, bias in (p.logit_bias or {}).items():
                biased[token] += bias
            factor = torch.where(biased[index] > 0, 1 / p.repetition_penalty, p.repetition_penalty)
            slopes[row, index] = factor
        if p.temperature >= 1e-5:
            slopes[row] /= p.temperature
    return slopes
