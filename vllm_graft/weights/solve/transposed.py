"""Whether a checkpoint keeps its matrices as `[in, out]` (Conv1D), seen from the model's."""

from __future__ import annotations

from vllm_graft.weights.errors import WeightError
from vllm_graft.weights.solve.groups import Group
from vllm_graft.weights.solve.layouts import Heads
from vllm_graft.weights.solve.roles import roles_of

_MLP = ("gate", "up", "gate_up", "down")
MATRICES = ("q", "k", "v", "qkv", "o", *_MLP, *(f"shared.{role}" for role in _MLP))


def ways(sources: list[Group], targets: list[Group], heads: Heads | None) -> list[bool]:
    """Transposed or not: one way where a matrix that is not square tells, both otherwise.

    Raises:
        WeightError: some matrices are transposed and others not.
    """
    theirs, ours = roles_of(sources), roles_of(targets)
    told: dict[bool, str] = {}
    for role in MATRICES:
        source, target = theirs.get((role, "weight")), ours.get((role, "weight"))
        if source is None or len(source.shape) != 2 or source.shape[0] == source.shape[1]:
            continue
        if target is not None and sorted(target.shape) == sorted(source.shape):
            told[source.shape != target.shape] = source.pattern
        elif role == "qkv" and heads is not None and heads.rows in source.shape:
            told[source.shape[0] != heads.rows] = source.pattern
    if len(told) == 2:
        raise WeightError(
            f"no plan: {told[True]!r} is transposed and {told[False]!r} is not; "
            "write the mapping by hand, for load_external_weights"
        )
    squares = any(role in MATRICES for role, _ in theirs.keys() & ours.keys())
    return list(told) or ([False, True] if squares else [False])
