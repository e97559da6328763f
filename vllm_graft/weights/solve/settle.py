"""Several plans are possible: the one whose logits are the reference's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vllm_graft.weights.errors import WeightError
from vllm_graft.weights.solve.candidates import Candidate
from vllm_graft.weights.solve.checkpoint import Checkpoint
from vllm_graft.weights.solve.plan import WeightPlan

Reference = Callable[[torch.Tensor], Any]
_LIMIT = 1e-3
"""Of the largest logit. Float32 models that sum in another order differ by 1e-5 at most; a
wrong plan for random weights by 1e-2 and more."""
_TOKENS = (2, 24)


def settle(
    model: nn.Module,
    checkpoint: Checkpoint,
    found: list[Candidate],
    reference: Reference | None,
    vocabulary: int,
) -> WeightPlan:
    """The one plan of `found`, or the one that gives the reference's logits.

    Raises:
        WeightError: not exactly one; lists them.
    """
    if reference is None:
        if len(found) == 1:
            return WeightPlan(found[0].lines)
        raise WeightError(
            f"no plan: names, shapes and config leave {len(found)} possible:\n"
            + "".join(f"  {candidate.assumed}\n" for candidate in found)
            + "give reference=, a callable that maps token ids to the right logits"
        )
    tokens = torch.randint(vocabulary, _TOKENS, generator=torch.Generator().manual_seed(0))
    want = _logits(reference, tokens)
    apart = [_difference(model, checkpoint, candidate, tokens, want) for candidate in found]
    fit = [at for at, difference in enumerate(apart) if difference <= _LIMIT]
    if len(fit) != 1:
        raise WeightError(
            f"no plan: the logits of {len(fit)} of {len(found)} candidates are the reference's "
            f"(difference of the largest, at most {_LIMIT}):\n"
            + "\n".join(
                f"  {difference:.1e} {candidate.assumed}"
                for difference, candidate in zip(apart, found, strict=True)
            )
        )
    best = found[fit[0]]
    checked = f"logits of the reference to {apart[fit[0]]:.1e} of the largest"
    sure = set(found[0].lines).intersection(*(candidate.lines for candidate in found))
    lines = (line if line in sure else replace(line, by="logits") for line in best.lines)
    plan = WeightPlan(tuple(lines), checked)
    plan.load(model, checkpoint.read())
    return plan


def _difference(
    model: nn.Module,
    checkpoint: Checkpoint,
    candidate: Candidate,
    tokens: torch.Tensor,
    want: torch.Tensor,
) -> float:
    WeightPlan(candidate.lines).load(model, checkpoint.read())
    got = _logits(model, tokens)
    if got.shape != want.shape:
        raise WeightError(f"logits {tuple(got.shape)}, those of the reference {tuple(want.shape)}")
    return float((got - want).abs().max() / want.abs().max())


@torch.no_grad()
def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    made = model(tokens)
    if hasattr(model, "compute_logits"):
        made = model.compute_logits(made)
    logits: torch.Tensor = getattr(made, "logits", made)
    return logits.float()
