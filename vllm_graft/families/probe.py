"""The calls of a hand-written model that Graft takes over: attention, and its own positions.

Calls that count positions or multiply queries by keys are known by their source line:
Graft's exact layers add calls of their own between a model's.

Legend: T tokens, B sequences, L length, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.attention.varlen import varlen_attn

from vllm_graft.families import flash_attn, scores
from vllm_graft.families.calls import AttentionCall, multi_head, sdpa
from vllm_graft.families.flex import flex, varlen
from vllm_graft.families.scores import Scores
from vllm_graft.families.visible import Watch

Line = tuple[str, int]
"""File and number of a source line."""
_TORCH = os.path.join(os.path.dirname(torch.__file__), "")
_FORMS: dict[Any, Callable[..., AttentionCall]] = {
    F.scaled_dot_product_attention: sdpa,
    flex_attention: flex,
}
_PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm,
             torch.Tensor.bmm)  # fmt: skip


class Calls(Watch):
    """Watch a forward on `length` tokens: give attention to `attend`, positions to `place`.

    Args:
        length: tokens of each row.
        attend: takes each attention call, returns its result `[B, N, L, H]`.
        place: gets the line of each call that may count the tokens, returns the positions
            `[length]` to take instead; None leaves the call alone.
        writes: whether a line begins attention that is written out, if its product has the
            shape of scores.
    """

    def __init__(
        self,
        length: int,
        attend: Callable[[AttentionCall], torch.Tensor],
        place: Callable[[Line], torch.Tensor | None] = lambda _: None,
        writes: Callable[[Line], bool] = lambda _: True,
    ) -> None:
        super().__init__()
        self.length, self.attend, self.place, self.writes = length, attend, place, writes
        self.follows: set[Line] = set()
        """Lines with a call whose result is as long as the tokens."""
        self.others: set[Line] = set()
        """Lines with one of which that is not so."""
        self.products: set[Line] = set()
        """Lines that begin attention that is written out."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        attention = self._attention(func)
        if attention is not None:
            return attention(*args, **kwargs)
        if func in _PRODUCTS and len(args) == 2:
            return self._product(func, args, kwargs)
        if any(isinstance(x, Scores) for x in args):
            return scores.change(func, args, kwargs)
        result = func(*args, **kwargs)
        if func not in (torch.arange, torch.Tensor.__getitem__):
            return result
        line = _caller()
        if line[0].startswith(_TORCH):  # indices of a block mask, not a model's positions
            return result
        if func is torch.arange:
            return self._arange(line, result)
        return self._slice(line, args[0], args[1], result)

    def _attention(self, func: Any) -> Callable[..., Any] | None:
        """What answers a call of `func`; None if it is not attention."""
        if func in _FORMS:
            form = _FORMS[func]
            return lambda *args, **kwargs: self.attend(form(*args, **kwargs))
        if func is F.multi_head_attention_forward:
            return partial(multi_head, self.attend)
        if func is varlen_attn:
            return partial(varlen, self.attend, self.length)
        flash = flash_attn.handler(func)
        return None if flash is None else partial(flash, self.attend, self.length)

    def _product(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        left, right = args
        if isinstance(left, Scores):
            call = replace(scores.weights(left), v=right)
            if left.dim() == 4:
                return self.attend(call)
            # `[B, L, H]`, one head that has a module of its own.
            q, k, v = (x.unsqueeze(1) for x in (call.q, call.k, right))
            return self.attend(replace(call, q=q, k=k, v=v)).squeeze(1)
        line = _caller()
        if self._shaped_as_scores(left, right) and self.writes(line):
            self.products.add(line)
            return scores.begin(left, right.transpose(-2, -1))
        return func(*args, **kwargs)

    def _shaped_as_scores(self, left: torch.Tensor, right: torch.Tensor) -> bool:
        if isinstance(right, torch.nn.Parameter) or not left.dim() == right.dim() in (3, 4):
            return False
        return left.shape[-2] == right.shape[-1] == self.length

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


def _caller() -> Line:
    frame: Any = sys._getframe(1)
    while frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def _first(part: Any, length: int) -> bool:
    start = (None, 0)
    return (
        isinstance(part, slice)
        and part.start in start
        and part.step is None
        and isinstance(part.stop, int)
        and part.stop == length
    )
