"""Tokens of a mixture of experts, each run with the weights of the expert that it chose.

How many tokens choose an expert differs from batch to batch. So experts run one after the other,
by products whose rows do not depend on how many there are.

Legend: T tokens, K experts per token, R routed rows (T * K, sorted by expert), D width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from vllm_graft import exact
from vllm_graft.products import packed_experts


def by_expert(
    run: Callable[..., torch.Tensor],
    x_RD: torch.Tensor,
    counts_E: torch.Tensor,
    *stacks: torch.Tensor,
) -> torch.Tensor:
    """`run` on the rows of every expert that has any.

    Args:
        run: takes rows `[r, D]` and the expert's own tensor of each stack; gives `[r, M]`, where
            a row does not depend on the others.
        x_RD: rows sorted by expert.
        counts_E: how many each expert has, int64.
        stacks: weights or biases, `[E, ...]`.

    Returns:
        `[R, M]`.

    Raises:
        RuntimeError: a CUDA graph is being recorded.
    """
    if counts_E.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"experts of {x_RD.dtype} run one by one, by counts that the host reads, which no CUDA "
            "graph can hold: pass enforce_eager=True, or serve TorchTitan's experts in bfloat16"
        )
    # unbind: its backward makes one gradient per stack; indexing would make one per expert.
    weights = zip(*(stack.unbind() for stack in stacks), strict=True)
    outputs = []
    for rows, own in zip(x_RD.split(counts_E.tolist()), weights, strict=True):
        # Without any row all run, so that their gradients are zero and not None.
        if len(rows) or not len(x_RD):
            outputs.append(run(rows, *own))
    return torch.cat(outputs)


def expert_products(
    module: Any, names: Sequence[str], x_RK: torch.Tensor, counts_E: torch.Tensor
) -> Sequence[torch.Tensor]:
    """Rows times the weights of their experts, by packed copies while the engine serves.

    Args:
        module: has stacks of weights `[E, M, K]` as parameters `names`.
        names: of those that read this input.
        x_RK: rows sorted by expert, K inputs.
        counts_E: how many each expert has, int64.

    Returns:
        `[R, M]` for each stack; a row does not depend on the others.
    """
    packed = packed_experts(module, names, x_RK, counts_E)
    if packed is not None:
        return packed
    run = torch.ops.vllm_graft.expert_product if exact.compiled_serving() else expert_product
    return [run(x_RK, counts_E, _local(getattr(module, name))) for name in names]


def expert_product(
    x_RK: torch.Tensor, counts_E: torch.Tensor, stack_EMK: torch.Tensor
) -> torch.Tensor:
    """`[R, M]`: one exact product for each expert that has rows."""
    return by_expert(exact.linear, x_RK, counts_E, stack_EMK)


def _local(stack: Any) -> torch.Tensor:
    """Parameters of a parallelized model are DTensors, whose shard is what runs here."""
    shard: torch.Tensor = stack.to_local() if hasattr(stack, "to_local") else stack
    return shard


exact.define_op(
    "expert_product(Tensor x, Tensor counts, Tensor stack) -> Tensor",
    expert_product,
    lambda x, counts, stack: x.new_empty(x.shape[0], stack.shape[1]),
)


def of_tokens(
    run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x_TD: torch.Tensor,
    ids_TK: torch.Tensor,
    scores_TK: torch.Tensor,
    experts: int,
) -> torch.Tensor:
    """Outputs `[T, D]` of the experts that each token chose, weighed and added in its own order.

    Args:
        run: takes rows `[R, D]` sorted by expert and how many each has, `[E]`; gives `[R, D]`,
            where a row does not depend on the others.
        ids_TK: chosen experts, below `experts`.
        scores_TK: their weights.
        experts: how many there are.
    """
    chosen_R = ids_TK.flatten()
    order_R = chosen_R.argsort(stable=True)
    # No bincount: compiled, its size would follow from values.
    counts_E = chosen_R.new_zeros(experts).scatter_add(0, chosen_R, torch.ones_like(chosen_R))
    rows_RD = run(x_TD[order_R // ids_TK.shape[1]], counts_E)
    chosen_TKD = rows_RD[order_R.argsort()].view(*ids_TK.shape, -1)
    # Not added expert by expert: the order in which a token chose them is its own.
    return (chosen_TKD * scores_TK[..., None]).sum(1).to(x_TD.dtype)
