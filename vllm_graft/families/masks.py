"""What the mask of an attention call hides: the future, what lies before a window, or else.

Legend: L length.
"""

from __future__ import annotations

import torch


class NotUnderstoodError(ValueError):
    """A step of a model's attention that Graft does not know; its module is not named yet."""


HIDES = -1e4
"""Scores with this much or more taken away have no weight."""


def hidden_by(mask: torch.Tensor, true_hides: bool) -> torch.Tensor:
    """Which scores `mask` hides, boolean, in the mask's shape.

    Args:
        mask: boolean, or numbers that are added to the scores.
        true_hides: what True says in a boolean mask.

    Raises:
        ValueError: it adds something other than 0 or minus infinity.
    """
    if mask.dtype == torch.bool:
        return mask if true_hides else ~mask
    hidden = mask <= HIDES
    if not bool((hidden | (mask == 0)).all()):
        raise ValueError(
            "something is added to the scores that is neither 0 nor minus infinity (a bias)"
        )
    return hidden


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
