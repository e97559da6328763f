"""The calls of a hand-written model that Graft takes over: attention, and its own positions.

Attention calls are known by their order. A call that counts positions is known by its source
line: Graft's exact layers add calls of their own between a model's.

Legend: T tokens, B sequences, L length, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

Line = tuple[str, int]
"""File and number of a source line."""


@dataclass(frozen=True, kw_only=True)
class SdpaSite:
    """One call of `scaled_dot_product_attention`."""

    name: str
    """Qualified name of the module that makes it."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float


class Calls(TorchFunctionMode):
    """Watch a forward on `length` tokens: give attention to `attend`, positions to `place`.

    Args:
        length: tokens of each row.
        attend: takes the arguments of `scaled_dot_product_attention`, returns its result.
        place: gets the line of each call that may count the tokens, returns the positions
            `[length]` to take instead; None leaves the call alone.
    """

    def __init__(
        self,
        length: int,
        attend: Callable[..., torch.Tensor],
        place: Callable[[Line], torch.Tensor | None],
    ) -> None:
        super().__init__()
        self.length, self.attend, self.place = length, attend, place
        self.follows: set[Line] = set()
        """Lines with a call whose result is as long as the tokens."""
        self.others: set[Line] = set()
        """Lines with one of which that is not so."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.attend(*args, **kwargs)
        if func not in (torch.arange, torch.Tensor.__getitem__):
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        caller = sys._getframe(1)
        line = caller.f_code.co_filename, caller.f_lineno
        if func is torch.arange:
            return self._arange(line, result)
        return self._slice(line, args[0], args[1], result)

    def _arange(self, line: Line, result: torch.Tensor) -> torch.Tensor:
        at = self.place(line)
        if at is not None:
            return at.to(result.dtype)
        counts = result.tolist() == list(range(self.length))
        (self.follows if counts else self.others).add(line)
        return result

    def _slice(
        self, line: Line, table: torch.Tensor, index: Any, result: torch.Tensor
    ) -> torch.Tensor:
        parts = index if isinstance(index, tuple) else (index,)
        cut = [dim for dim, part in enumerate(parts) if _first(part, self.length)]
        at = self.place(line)
        if at is not None:
            return table.index_select(cut[0], at)
        whole = all(
            isinstance(part, slice) and part == slice(None)
            for dim, part in enumerate(parts)
            if dim not in cut
        )
        counts = len(cut) == 1 and whole and table.shape[cut[0]] > self.length
        (self.follows if counts else self.others).add(line)
        return result


def _first(part: Any, length: int) -> bool:
    start = (None, 0)
    return (
        isinstance(part, slice)
        and part.start in start
        and part.step is None
        and isinstance(part.stop, int)
        and part.stop == length
    )


def sdpa_site(
    name: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> SdpaSite:
    """What one call asks for.

    Raises:
        ValueError: with `name`: a mask, attention that is not causal, or other shapes than
            `[1, N, L, H]`.
    """
    if attn_mask is not None:
        raise ValueError(f"{name}: attn_mask is given; what it hides in longer samples is not "
                         "known. Pass is_causal=True and no mask")  # fmt: skip
    if not is_causal:
        raise ValueError(f"{name}: attention is not causal; it cannot be served from a KV cache")
    if q.dim() != 4 or k.shape != v.shape or k.shape[2] != q.shape[2]:
        shapes = tuple(q.shape), tuple(k.shape), tuple(v.shape)
        raise ValueError(f"{name}: expected q [B, N, L, H] and k, v [B, K, L, H], got {shapes}")
    return SdpaSite(
        name=name,
        num_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_dim=q.shape[3],
        scale=q.shape[3] ** -0.5 if scale is None else float(scale),
    )
