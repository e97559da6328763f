"""`solve_weight_plan`: the one plan that is possible; what stays open is an error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vllm_graft.weights.errors import WeightError
from vllm_graft.weights.fp8 import SUFFIX
from vllm_graft.weights.solve.candidates import Sides, candidates
from vllm_graft.weights.solve.checkpoint import Checkpoint, Source
from vllm_graft.weights.solve.groups import groups_of
from vllm_graft.weights.solve.plan import WeightPlan
from vllm_graft.weights.solve.roles import roles_of
from vllm_graft.weights.solve.settle import Reference, settle
from vllm_graft.weights.solve.waived import needed, waived


def solve_weight_plan(
    model: nn.Module,
    checkpoint: Source,
    config: Mapping[str, Any] | None = None,
    reference: Reference | None = None,
) -> WeightPlan:
    """Propose how a checkpoint loads into `model`, from names, shapes and the config.

    Args:
        model: the module that gets the weights; on meta will do without a reference.
        checkpoint: a folder with `config.json` and safetensors, or names to tensors.
        config: of the checkpoint, as in `config.json`; that of the folder by default.
        reference: maps token ids `[B, L]` to logits `[B, L, V]` (or an object with
            `logits`), the right ones for this checkpoint. `model` must do the same, in
            float32. Candidates are loaded into `model` and run; it keeps those of the plan.

    Raises:
        WeightError: nothing or more than one plan is possible, by names, shapes and config
            or by the reference's logits; what is left over on either side.
    """
    given = Checkpoint(checkpoint, config)
    away = waived({name: shape for name, (shape, _) in given.tensors.items()}, given.config)
    targets = groups_of(_shapes(model))
    parameters = {name for name, _ in model.named_parameters()}
    sides = Sides(
        sources=groups_of(needed(given.tensors, away)),
        targets=targets,
        wanted=[group for group in targets if parameters & {*group.names()}],
        config=given.config,
        model=model,
    )
    found = candidates(sides)
    for candidate in found:
        _check_scales(WeightPlan(candidate.lines), given)
    embed = roles_of(targets).get(("embed", "weight"))
    vocabulary = embed.shape[0] if embed else int(given.config.get("vocab_size", 1))
    plan_lines = [replace(c, lines=(*away, *c.lines)) for c in found]
    return settle(model, given, plan_lines, reference, vocabulary)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of what a checkpoint may fill; Megatron's extra state is no tensor."""
    state = model.state_dict(keep_vars=True).items()
    return {name: tuple(value.shape) for name, value in state if isinstance(value, torch.Tensor)}


def _check_scales(plan: WeightPlan, given: Checkpoint) -> None:
    """FP8 blocks do not survive a cut."""
    for name in given.tensors:
        if name.endswith(SUFFIX) and plan.cuts(name.removesuffix(SUFFIX)):
            raise WeightError(
                f"no plan: {name.removesuffix(SUFFIX)!r} is block FP8 and would have to be cut; "
                "dequantize the checkpoint first"
            )
