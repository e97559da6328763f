"""Calls of `flex_attention` and `varlen_attn` in Graft's one form.

Legend: T tokens of all rows one after another, B sequences, L length, N query heads,
K key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from vllm_graft.families.calls import AttentionCall
from vllm_graft.families.masks import NotUnderstoodError
from vllm_graft.families.scores import Scores, follow


def flex(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    score_mod: Callable[..., torch.Tensor] | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Any = None,
    *,
    return_aux: Any = None,
) -> AttentionCall:
    """A call of `flex_attention`, which has its arguments.

    Raises:
        NotUnderstoodError: it returns more than its output.
    """
    if return_lse or return_aux is not None:
        raise NotUnderstoodError("flex_attention with return_lse or return_aux")
    call = AttentionCall(q=q, k=k, v=v, scale=q.shape[-1] ** -0.5 if scale is None else scale)
    if block_mask is not None:
        call = replace(call, hides=(lambda: _hidden(block_mask.mask_mod, q),))
    return call if score_mod is None else replace(call, modified=lambda c: _modify(c, score_mod))


def _hidden(mask_mod: Callable[..., torch.Tensor], q: torch.Tensor) -> torch.Tensor:
    """`[L, L]` from the indices of all tokens, once if no head is asked for, else head by head.

    Raises:
        ValueError: heads differ.
    """
    from torch.nn.attention.flex_attention import create_mask

    heads, length = q.shape[1], q.shape[2]

    def seen(head: Any) -> torch.Tensor:
        def of_head(b: torch.Tensor, _: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> Any:
            return mask_mod(b, head, i, j)

        return create_mask(of_head, 1, 1, length, length, device=q.device)[0, 0]

    try:
        return ~seen(_AnyHead())
    except Exception:  # whatever a model does with a head that is no number
        first, *others = (seen(torch.tensor(head, device=q.device)) for head in range(heads))
    if not all(torch.equal(other, first) for other in others):
        raise ValueError("its mask differs between heads")
    return ~first


class _AnyHead:
    """In the place of a head's index: every use raises."""

    def __eq__(self, other: object) -> bool:
        raise TypeError("a head's index is used")

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise TypeError("a head's index is used")


def _modify(call: AttentionCall, score_mod: Callable[..., torch.Tensor]) -> AttentionCall:
    """What `score_mod` makes of the scores, read like steps between a product and a softmax."""
    shape = torch.Size([*call.q.shape[:-1], call.k.shape[-2]])
    scores = Scores(replace(call, hides=()), shape)  # the block mask comes after
    at = torch.arange(call.q.shape[2], device=call.q.device)
    head = torch.arange(call.q.shape[1], device=call.q.device)[:, None, None]
    changed = follow(score_mod, scores, torch.zeros_like(at[0]), head, at[:, None], at)
    if not isinstance(changed, Scores):
        raise NotUnderstoodError("score_mod returns something else than changed scores")
    return replace(changed.call, hides=(*changed.call.hides, *call.hides))


def varlen(
    attend: Callable[[AttentionCall], torch.Tensor],
    length: int,
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """A call of `varlen_attn`, which has the arguments after `length`, given to `attend`.

    Args:
        attend: takes the call on rows of `length` tokens.
        length: L; T is a multiple of it.

    Raises:
        NotUnderstoodError: a cache of the model's own, or more than the output returned.
    """
    given = {"return_aux": return_aux, "seqused_k": seqused_k, "block_table": block_table}
    refused = [name for name, value in given.items() if value is not None]
    if refused:
        raise NotUnderstoodError(f"varlen_attn with {', '.join(refused)}")
    call = AttentionCall(
        q=q_TNH,
        k=k_TKH,
        v=v_TKH,
        scale=q_TNH.shape[-1] ** -0.5 if scale is None else scale,
        hides=(lambda: apart(cu_seq_q, cu_seq_k, len(q_TNH), window_size),),
    )
    return by_rows(attend, length, call)


def by_rows(
    attend: Callable[[AttentionCall], torch.Tensor], length: int, flat: AttentionCall
) -> torch.Tensor:
    """`attend` on rows of `length` tokens; `flat` has `[T, N, H]`, the result too."""
    q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (flat.q, flat.k, flat.v))
    out = attend(replace(flat, q=q, k=k, v=v))
    return out.transpose(1, 2).flatten(0, 1).contiguous()


def apart(
    cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor | None, tokens: int, window: tuple[int, int]
) -> torch.Tensor:
    """`[T, T]`, True where tokens are of different sequences or further apart than the window.

    Raises:
        ValueError: the keys' sequences are not the queries'.
    """
    if cu_seq_k is None or not torch.equal(cu_seq_q, cu_seq_k):
        raise ValueError("keys of other sequences than the queries")
    at = torch.arange(tokens, device=cu_seq_q.device)
    sequence = torch.searchsorted(cu_seq_q, at.to(cu_seq_q.dtype), right=True)
    return (sequence[:, None] != sequence) | outside(at, window)


def outside(at: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
    """`[T, T]`, True where a key is further back or ahead than the window; -1 is no limit."""
    behind = at[:, None] - at
    left, right = window
    hidden = behind > left if left >= 0 else torch.zeros_like(behind, dtype=torch.bool)
    return hidden | (-behind > right) if right >= 0 else hidden
