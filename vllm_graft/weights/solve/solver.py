"""`solve_weight_plan`: roles of both sides brought together; what stays open is an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vllm_graft.weights.errors import WeightError
from vllm_graft.weights.solve.checkpoint import Checkpoint, Source
from vllm_graft.weights.solve.groups import Group, groups_of
from vllm_graft.weights.solve.layouts import Heads
from vllm_graft.weights.solve.line import Line
from vllm_graft.weights.solve.pieces import Piece, pieces_of
from vllm_graft.weights.solve.plan import WeightPlan
from vllm_graft.weights.solve.rope import checkpoint_rope, model_rope


def solve_weight_plan(
    model: nn.Module, checkpoint: Source, config: Mapping[str, Any] | None = None
) -> WeightPlan:
    """Propose how a checkpoint loads into `model`, from names, shapes and the config.

    Args:
        model: the module that gets the weights; on meta will do.
        checkpoint: a folder with `config.json` and safetensors, or names to tensors.
        config: of the checkpoint, as in `config.json`; that of the folder by default.

    Raises:
        WeightError: whatever names and shapes do not decide, or is left over on either side.
    """
    given = Checkpoint(checkpoint, config)
    sources = groups_of({name: shape for name, (shape, _) in given.tensors.items()})
    targets = groups_of(_shapes(model))
    heads = Heads.of(given.config)
    theirs, ours = pieces_of(sources, heads), pieces_of(targets, heads)
    pairs: list[tuple[Piece, Piece, Line]] = []
    for role in theirs.keys() & ours.keys():
        line = _line(theirs[role], ours[role])
        if line is not None:
            pairs.append((theirs[role], ours[role], line))
    used = [(source, line.take) for source, _, line in pairs]
    filled = [(target, line.put) for _, target, line in pairs]
    wrong = _open(sources, used, "checkpoint tensor")
    wrong += _open(_wanted(model, targets), filled, "parameter")
    if wrong:
        raise WeightError(
            "no plan: names and shapes leave open:\n  " + "\n  ".join(wrong) + "\n"
            "write the mapping by hand, for load_external_weights"
        )
    _check_rope(given.config, model)
    order = {group.pattern: at for at, group in enumerate(sources)}
    lines = sorted(
        (line for *_, line in pairs), key=lambda line: (order[line.tensor], line.put or ())
    )
    return WeightPlan(tuple(lines))


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of what a checkpoint may fill; Megatron's extra state is no tensor."""
    state = model.state_dict(keep_vars=True).items()
    return {name: tuple(value.shape) for name, value in state if isinstance(value, torch.Tensor)}


def _line(source: Piece, target: Piece) -> Line | None:
    """The line for two pieces of one role; None: their shapes or numbers differ."""
    theirs, ours, name = source.group, target.group, target.group.pattern
    if source.shape != target.shape or theirs.numbers != ours.numbers:
        size = ours.shape[0] if ours.shape else 0
        experts = {(*n, str(row)) for n in ours.numbers for row in range(size)}
        if (
            source.rows
            or target.rows
            or ours.shape[1:] != source.shape
            or theirs.numbers != experts
        ):
            return None
        name += "[{}]"
    return Line(theirs.pattern, name, "names", take=source.rows, put=target.rows)


def _wanted(model: nn.Module, targets: list[Group]) -> list[Group]:
    """Groups with a parameter in them that no earlier name already stands for."""
    parameters = {name for name, _ in model.named_parameters()}
    return [group for group in targets if parameters & {*group.names()}]


def _open(
    groups: list[Group], used: list[tuple[Piece, tuple[int, ...] | None]], what: str
) -> list[str]:
    """A text for every group of which not every row is used once."""
    wrong = []
    for group in groups:
        rows = [rows for piece, rows in used if piece.group == group]
        listed = [row for part in rows if part is not None for row in part]
        if rows != [None] and sorted(listed) != list(range(group.shape[0] if group.shape else 0)):
            wrong.append(
                f"{what} {group.pattern!r} {list(group.shape)}, {len(group.numbers)} of it"
            )
    return wrong


def _check_rope(config: Mapping[str, Any], model: nn.Module) -> None:
    found = checkpoint_rope(dict(config)), model_rope(model)
    if None in found or found[0] != found[1]:
        raise WeightError(
            f"no plan: RoPE rows of the checkpoint are in order {found[0]}, those of the model in "
            f"{found[1]} (None: unknown); only equal, known orders are mapped"
        )
