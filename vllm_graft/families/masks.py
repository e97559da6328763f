"""What an attention call does to its scores: hides the future, or what lies before a window; ALiBi.

Legend: L length, N query heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class NotUnderstoodError(ValueError):
    """A step of a model's attention that Graft does not know; its module is not named yet."""


HIDES = -1e4
"""Scores with this much or more taken away have no weight."""


def slopes_of(added: Sequence[torch.Tensor], hidden: torch.Tensor) -> tuple[float, ...] | None:
    """ALiBi's slopes, one per head, of all that is added to scores; None if it only hides.

    A number that a query adds for all its keys changes no softmax, so each row counts from the
    query's own key. A bias may be rounded in its dtype; the slope is that of the line through it.

    Args:
        added: each `[N, L, L]` or what broadcasts to it.
        hidden: `[L, L]`, True where a key is not seen; causal.

    Raises:
        ValueError: it does not fall by one slope per token of distance.
    """
    whole = sum((torch.where(hidden, 0, x) for x in added), torch.zeros_like(hidden))
    if not bool(whole.any()):
        return None
    eps = max(torch.finfo(x.dtype).eps for x in (*added, torch.ones(1)) if x.is_floating_point())
    slopes = tuple(_slope(head, hidden, eps) for head in whole.reshape(-1, *hidden.shape))
    return slopes if any(slopes) else None


def _slope(head: torch.Tensor, hidden: torch.Tensor, eps: float) -> float:
    at = torch.arange(len(head), device=head.device)
    distance = (at[:, None] - at).masked_fill(hidden, 0).double()
    fallen = (head.diagonal()[:, None] - head).masked_fill(hidden, 0).double()
    slope = float((fallen * distance).sum() / distance.square().sum().clamp(min=1))
    off = float((fallen - slope * distance).abs().max())
    if not off <= 4 * eps * float(head.abs().max()):
        raise ValueError(
            "something is added to the scores that is neither 0 nor minus infinity (a bias), nor "
            f"ALiBi: it lies {off:.2g} beside the line of slope {slope:.4g}"
        )
    return slope


def window_of(hidden: torch.Tensor, length: int) -> int | None:
    """The sliding window of a causal mask; None where every earlier key is seen.

    Args:
        hidden: `[..., L, L]` or what broadcasts to it, True where a key is not seen.
        length: L.

    Raises:
        ValueError: another mask, or one that differs between heads or samples.
    """
    rows = hidden.broadcast_to(torch.broadcast_shapes(hidden.shape, (length, length)))
    seen = ~rows.reshape(-1, length, length)
    distance = torch.arange(length, device=seen.device)
    distance = distance[:, None] - distance
    if bool((seen & (distance < 0)).any()):
        raise ValueError("its mask shows later tokens: attention is not causal")
    window = int(seen[0, -1].sum())
    if not bool((seen == ((distance >= 0) & (distance < window))).all()):
        raise ValueError("its mask is neither causal nor a window over the last tokens")
    return window if window < length else None
