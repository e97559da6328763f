"""Attention calls of a model in one form, whichever function they were made by.

Legend: B sequences, L length, N query heads, K key/value heads, H head dim, D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from vllm_graft.exact import linear
from vllm_graft.families.masks import HIDES, NotUnderstoodError, slopes_of, window_of


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """One attention call of a model, in whichever form it was written."""

    q: torch.Tensor
    """`[B, N, L, H]`"""
    k: torch.Tensor
    """`[B, K, L, H]`"""
    v: torch.Tensor
    """`[B, K, L, H]`; of scores that have not met it, the keys."""
    scale: float = 1.0
    softcap: float | None = None
    hides: tuple[Callable[[], torch.Tensor], ...] = ()
    """Its masks, True where a key is not seen; computed only where they are asked for."""
    adds: tuple[Callable[[], torch.Tensor], ...] = ()
    """What is added to its scores, behind scale and softcap: ALiBi, or numbers that hide."""
    is_causal: bool = False
    dropout: float = 0.0
    modified: Callable[[AttentionCall], AttentionCall] | None = None
    """Gives the call with what else happens to the scores; None if nothing does."""


def settled(call: AttentionCall) -> AttentionCall:
    """The call with all that happens to its scores, `modified` among it.

    Raises:
        NotUnderstoodError: a step that Graft does not know.
    """
    return call if call.modified is None else call.modified(replace(call, modified=None))


@dataclass(frozen=True, kw_only=True)
class Site:
    """One attention call of a model, as the probe recorded it."""

    name: str
    """Qualified name of the module that makes it."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    softcap: float | None
    sliding_window: int | None
    """As far as the tokens of the probe show it."""
    alibi_slopes: tuple[float, ...] | None
    """One per query head."""
    masked: bool
    """Causal by a mask, which says nothing of longer samples than the probe's."""
    rotated: bool = False
    """Whether its queries and keys have been turned by RoPE before."""


def sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall:
    """A call of `scaled_dot_product_attention`, which has its arguments."""
    return AttentionCall(
        q=q,
        k=k,
        v=v,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        **under(attn_mask, true_hides=False),
        is_causal=is_causal,
        dropout=dropout_p,
    )


def under(mask: torch.Tensor | None, *, true_hides: bool) -> dict[str, Any]:
    """A call's options for a mask: boolean, or numbers that are added to the scores.

    Args:
        mask: None for no mask.
        true_hides: what True says in a boolean one.
    """
    if mask is None:
        return {}
    if mask.dtype != torch.bool:
        return {"adds": (lambda: mask,)}
    return {"hides": (lambda: mask if true_hides else ~mask,)}


def multi_head(
    attend: Callable[[AttentionCall], torch.Tensor], *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """`F.multi_head_attention_forward` with its attention given to `attend`; no weights.

    Raises:
        NotUnderstoodError: anything but self-attention under a mask.
    """
    a = _bound(args, kwargs)
    refused = ("bias_k", "bias_v", "key_padding_mask", "static_k", "static_v")
    given = [name for name in refused if a[name] is not None]
    if a["add_zero_attn"] or given:
        raise NotUnderstoodError(
            f"nn.MultiheadAttention with {', '.join(given) or 'add_zero_attn'}"
        )
    x_LBD, bias = a["query"], a["in_proj_bias"]
    if x_LBD is not a["key"] or x_LBD is not a["value"] or a["in_proj_weight"] is None:
        raise NotUnderstoodError("nn.MultiheadAttention with other keys or values than its queries")
    if x_LBD.dim() != 3:
        raise NotUnderstoodError(
            f"nn.MultiheadAttention on {tuple(x_LBD.shape)}, expected [B, L, D]"
        )
    heads, mask = a["num_heads"], a["attn_mask"]
    q, k, v = (
        x.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
        for x in linear(x_LBD, a["in_proj_weight"], bias).chunk(3, -1)
    )
    call = AttentionCall(
        q=q,
        k=k,
        v=v,
        scale=q.shape[-1] ** -0.5,
        **under(mask, true_hides=True),
        dropout=a["dropout_p"] if a["training"] else 0.0,
    )
    out_LBD = attend(call).permute(2, 0, 1, 3).flatten(2)
    return linear(out_LBD, a["out_proj_weight"], a["out_proj_bias"]), None


def _bound(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(F.multi_head_attention_forward)
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def site_of(name: str, call: AttentionCall) -> Site:
    """What one call asks for.

    Raises:
        ValueError: with `name`: attention that is not causal, or other shapes.
        NotUnderstoodError: something happens to the scores that Graft does not know.
    """
    call = settled(call)
    q, k, v = call.q, call.k, call.v
    if q.dim() != 4 or q.shape[0] != 1 or k.shape != v.shape or k.shape[2] != q.shape[2]:
        shapes = tuple(q.shape), tuple(k.shape), tuple(v.shape)
        raise ValueError(
            f"{name}: expected q [B, N, L, H] and k, v [B, K, L, H] for B=1 row, got {shapes}"
        )
    try:
        window, slopes = _seen(call)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    heads = q.shape[1]
    return Site(
        name=name,
        num_heads=heads,
        num_kv_heads=k.shape[1],
        head_dim=q.shape[3],
        scale=call.scale,
        softcap=call.softcap,
        sliding_window=window,
        alibi_slopes=slopes * heads if slopes is not None and len(slopes) == 1 else slopes,
        masked=bool(call.hides or call.adds),
    )


def _seen(call: AttentionCall) -> tuple[int | None, tuple[float, ...] | None]:
    """The window and the slopes of all that happens to its scores."""
    if not (call.hides or call.adds):
        if call.is_causal:
            return None, None
        raise ValueError("attention is not causal; it cannot be served from a KV cache")
    length = call.q.shape[2]
    hidden = torch.full((length, length), call.is_causal, device=call.q.device).triu(1)
    for hides in call.hides:
        hidden = hidden | hides()
    added = [adds() for adds in call.adds]
    if any(number.requires_grad for number in added):
        raise ValueError("something learned is added to the scores")
    for number in added:
        hidden = hidden | (number <= HIDES)
    window = window_of(hidden, length)
    at = torch.arange(length, device=hidden.device)
    behind = at[:, None] - at
    return window, slopes_of(added, (behind < 0) | (behind >= (window or length)))
