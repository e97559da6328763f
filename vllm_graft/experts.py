"""Tokens of a mixture of experts, each run with the weights of the expert that it chose.

How many tokens choose an expert differs from batch to batch. So experts run one after the other,
by products whose rows do not depend on how many there are.

Legend: T tokens, K experts per token, R routed rows (T * K, sorted by expert), D width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def by_expert(
    run: Callable[..., torch.Tensor],
    x_RD: torch.Tensor,
    counts_E: torch.Tensor,
    *stacks: torch.Tensor,
) -> torch.Tensor:
    """`run` on the rows of every expert that has any.

    Args:
        run: takes rows `[r, D]` and the expert's own tensor of each stack; gives `[r, D]`, where
            a row does not depend on the others.
        x_RD: rows sorted by expert.
        counts_E: how many each expert has, int64.
        stacks: weights or biases, `[E, ...]`.

    Returns:
        `[R, D]`.
    """
    # unbind: its backward makes one gradient per stack; indexing would make one per expert.
    weights = zip(*(stack.unbind() for stack in stacks), strict=True)
    outputs = [x_RD[:0]]
    for rows, own in zip(x_RD.split(counts_E.tolist()), weights, strict=True):
        # Without any row all run, so that their gradients are zero and not None.
        if len(rows) or not len(x_RD):
            outputs.append(run(rows, *own))
    return torch.cat(outputs)


def of_tokens(
    run: Callable[..., torch.Tensor],
    x_TD: torch.Tensor,
    ids_TK: torch.Tensor,
    scores_TK: torch.Tensor,
    *stacks: torch.Tensor,
) -> torch.Tensor:
    """Outputs `[T, D]` of the experts that each token chose, weighed and added in its own order.

    Args:
        run: as in `by_expert`.
        ids_TK: chosen experts, below E.
        scores_TK: their weights.
        stacks: weights or biases, `[E, ...]`.
    """
    order_R = ids_TK.flatten().argsort(stable=True)
    counts_E = ids_TK.flatten().bincount(minlength=len(stacks[0]))
    rows_RD = by_expert(run, x_TD[order_R // ids_TK.shape[1]], counts_E, *stacks)
    chosen_TKD = rows_RD[order_R.argsort()].view(*ids_TK.shape, -1)
    # Not added expert by expert: the order in which a token chose them is its own.
    return (chosen_TKD * scores_TK[..., None]).sum(1).to(x_TD.dtype)
