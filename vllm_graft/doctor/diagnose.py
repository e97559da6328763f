"""Which fault it most likely is: corrections are tried, and what restores parity is first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from vllm_graft.doctor.corrections import corrections, seams
from vllm_graft.doctor.rotations import rotations
from vllm_graft.doctor.sides import Adapted, ModuleReference, Prompts, trace

_WORTH_NAMING = 0.5
"""A correction that leaves more than this share of the difference explains nothing."""


@dataclass(frozen=True)
class Diagnosis:
    """One fault that explains (part of) the difference."""

    fault: str
    where: str
    found: str
    expected: str
    remaining: float
    """Share of the mean difference of the log-probs that is left with the correction."""

    def __str__(self) -> str:
        return (
            f"{self.fault} at {self.where}: found {self.found}, expected {self.expected} "
            f"({self.remaining:.1%} of the difference is left with it corrected)"
        )


def diagnose(
    adapted: Adapted,
    reference: ModuleReference,
    prompts: Prompts,
    config: Any,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Diagnosis]:
    """Rank the known faults by what is left of the difference with each corrected.

    Args:
        adapted: the port that diverges; unchanged afterwards.
        reference: the model that is right.
        prompts: a few short token lists.
        config: Hugging Face config of the checkpoint.
        progress: told what is tried.

    Returns:
        The faults that explain at least half of the difference, best first; each once.
    """
    want = trace(reference, prompts).logprobs
    before = _difference(trace(adapted, prompts).logprobs, want)
    tried: dict[str, Diagnosis] = {}
    model = adapted.module
    for each in chain(corrections(model, reference.module, config), _rotations(model, config)):
        progress(f"trying: {each.fault}")
        with each.apply():
            left = _difference(trace(adapted, prompts).logprobs, want) / before
        best = tried.get(each.fault)
        if best is None or left < best.remaining:
            tried[each.fault] = Diagnosis(each.fault, each.where, each.found, each.expected, left)
    ranked = sorted(tried.values(), key=lambda diagnosis: diagnosis.remaining)
    return [diagnosis for diagnosis in ranked if diagnosis.remaining < _WORTH_NAMING]


def _difference(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().mean().nan_to_num(nan=float("inf")))


def _rotations(model: Any, config: Any) -> Any:
    found = seams(model)
    thetas = rope_thetas(config, len(found))
    # Megatron's seam rotates what it is given: nothing can be turned back in front of it.
    inside = any(getattr(core, "rotary", ()) for _, core in found)
    return rotations(model, thetas) if thetas and not inside else ()


def rope_thetas(config: Any, layers: int) -> list[float]:
    """`rope_theta` of each layer as the checkpoint has it; empty without rotary embeddings."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = getattr(config, "layer_types", None) or []
    if len(kinds) == layers and all(isinstance(parameters.get(kind), dict) for kind in kinds):
        return [float(parameters[kind]["rope_theta"]) for kind in kinds]
    theta = parameters.get("rope_theta", getattr(config, "rope_theta", None))
    return [] if theta is None else [float(theta)] * layers
