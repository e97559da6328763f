"""Trying an adapted model out on two short samples before anybody relies on it.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vllm_graft.positions import packed

LENGTHS = (11, 13)
"""Two, so that a count that follows the tokens differs from one that only looks so."""
_LIMIT = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Largest difference over the largest logit: another order of sums, not another result."""


def tokens_of(embedding: nn.Embedding, length: int) -> torch.Tensor:
    """Token ids `[length]` that the embedding has."""
    return torch.arange(length, device=embedding.weight.device) * 7 % embedding.num_embeddings


@torch.no_grad()
def check_packed(adapted: Any, samples: Sequence[torch.Tensor], want: torch.Tensor) -> None:
    """Compare samples packed into one row with what they give alone.

    Args:
        adapted: a `VLLMModelForCausalLM` around `adapted.model`.
        samples: token ids of each.
        want: logits `[T, V]` of the last tokens of all samples together.

    Raises:
        ValueError: they differ, or are no numbers.
    """
    if not bool(want.isfinite().all()):
        raise ValueError(_not_finite(adapted.model))
    got = packed_logits(adapted, samples)[-len(want) :]
    if not near(got, want):
        raise ValueError(
            f"{type(adapted.model).__name__}: two samples packed into one row give other logits "
            f"than alone, by {_apart(got, want):.2g} of the largest. Usual causes: positions that "
            "are counted in a way Graft does not see (pass `positions` to forward), state outside "
            "attention, attention that Graft does not know"
        )


def _not_finite(model: nn.Module) -> str:
    largest = {name: float(p.detach().abs().max()) for name, p in model.named_parameters()}
    name = max(largest, key=lambda n: (not largest[n] < math.inf, largest[n]))
    return (
        f"{type(model).__name__}: its logits are not finite, so it cannot be tried out. Was a "
        f"parameter never initialised? The largest value, {largest[name]:.2g}, is in {name}; give "
        "it values when the model is built, the checkpoint's come later"
    )


@torch.no_grad()
def packed_logits(adapted: Any, samples: Sequence[torch.Tensor]) -> torch.Tensor:
    """Logits `[T, V]` of samples in one row."""
    lengths = [len(sample) for sample in samples]
    borders = torch.tensor([0, *lengths], device="cpu").cumsum(0)
    with packed(borders):
        logits: torch.Tensor = adapted.compute_logits(adapted(torch.cat(list(samples))))
    return logits


def near(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether they differ by no more than another order of sums explains."""
    return _apart(got, want) <= _LIMIT.get(want.dtype, 5e-2)


def _apart(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())
