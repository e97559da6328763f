"""`solve_weight_plan`: roles of both sides brought together; what stays open is an error."""

from __future__ import annotations

from torch import nn

from vllm_graft.weights.errors import WeightError
from vllm_graft.weights.solve.checkpoint import Checkpoint, Source
from vllm_graft.weights.solve.groups import groups_of
from vllm_graft.weights.solve.line import Line
from vllm_graft.weights.solve.plan import WeightPlan
from vllm_graft.weights.solve.roles import roles_of
from vllm_graft.weights.solve.rope import checkpoint_rope, model_rope


def solve_weight_plan(model: nn.Module, checkpoint: Source) -> WeightPlan:
    """Propose how a checkpoint loads into `model`, by names and shapes: renames only.

    Raises:
        WeightError: whatever names and shapes do not decide, or is left over on either side.
    """
    given = Checkpoint(checkpoint, None)
    sources = groups_of({name: shape for name, (shape, _) in given.tensors.items()})
    targets = groups_of({name: tuple(p.shape) for name, p in model.named_parameters()})
    ours = {role: group for role, group in roles_of(targets).items()}
    theirs = roles_of(sources)
    pairs = [
        (theirs[role], ours[role])
        for role in theirs.keys() & ours.keys()
        if (theirs[role].shape, theirs[role].numbers) == (ours[role].shape, ours[role].numbers)
    ]
    left = [g.pattern for g in sources if g not in [pair[0] for pair in pairs]]
    open_ = [g.pattern for g in targets if g not in [pair[1] for pair in pairs]]
    if left or open_:
        raise WeightError(f"no plan: checkpoint tensors {left}, model parameters {open_} stay open")
    rope = checkpoint_rope(given.config), model_rope(model)
    if None in rope or rope[0] != rope[1]:
        raise WeightError(f"RoPE order of the checkpoint and of the model: {rope}; not one order")
    order = {group: at for at, group in enumerate(sources)}
    lines = [
        Line(s.pattern, t.pattern, "names")
        for s, t in sorted(pairs, key=lambda pair: order[pair[0]])
    ]
    return WeightPlan(tuple(lines))
