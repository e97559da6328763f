"""The calls of a hand-written model that Graft takes over: attention, and its own positions.

Calls that count positions or multiply queries by keys are known by their source line:
Graft's exact layers add calls of their own between a model's.

Legend: T tokens, B sequences, L length, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.attention.varlen import varlen_attn

from vllm_graft.exact import linear
from vllm_graft.families import einsum, flash_attn, scores
from vllm_graft.families.calls import AttentionCall, multi_head, sdpa
from vllm_graft.families.flex import flex, varlen
from vllm_graft.families.scores import Scores
from vllm_graft.families.visible import Watch

Line = tuple[str, int]
"""File and number of a source line."""
_TORCH = os.path.join(os.path.dirname(torch.__file__), "")
_GRAFT = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")
_MASKS = os.path.join("transformers", "masking_utils.py")
_FORMS: dict[Any, Callable[..., AttentionCall]] = {
    F.scaled_dot_product_attention: sdpa,
    flex_attention: flex,
}
_PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm,
             torch.Tensor.bmm)  # fmt: skip
_ADDED_PRODUCTS = (torch.baddbmm, torch.Tensor.baddbmm)


class Calls(Watch):
    """Watch a forward on token ids: give attention to `attend`, positions to `place`.

    Args:
        shape: `[B, L]` of the token ids.
        attend: takes each attention call, returns its result `[B, N, L, H]`.
        place: gets the line of each call that may count the tokens, returns the positions
            `[L]` to take instead, or None, which leaves the call alone. Without it such calls
            are noted in `follows` and `others`.
        writes: whether a line begins attention that is written out, if its product has the
            shape of scores.
    """

    def __init__(
        self,
        shape: torch.Size,
        attend: Callable[[AttentionCall], torch.Tensor],
        place: Callable[[Line], torch.Tensor | None] | None = None,
        writes: Callable[[Line], bool] = lambda _: True,
    ) -> None:
        super().__init__()
        self.rows, self.length = shape
        self.attend, self.place, self.writes = attend, place, writes
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
        weighted = _weighted(func, args, kwargs)
        if weighted is not None:
            return weighted
        written = self._written(func, args, kwargs)
        if written is not None:
            return written
        if any(isinstance(x, Scores) for x in args):
            return scores.change(func, args, kwargs)
        if func is torch.arange:
            return self._arange(_caller(), args, kwargs)
        if func is torch.Tensor.__getitem__:
            return self._slice(_caller(), *args)
        return func(*args, **kwargs)

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

    def _written(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a step of attention that is written out; None if `func` is none."""
        if func in _PRODUCTS and len(args) == 2:
            left, right = args
            if isinstance(left, Scores):
                return self._meet(left, right)
            return self._begin(left, right.transpose(-2, -1)) if right.dim() > 1 else None
        if func in _ADDED_PRODUCTS:
            return self._added_product(*args, **kwargs)
        if func is torch.einsum and isinstance(args[0], str):
            return self._einsum(*args)
        return None

    def _begin(self, q: torch.Tensor, k: torch.Tensor) -> Scores | None:
        line = _caller(_TORCH)  # `torch.einsum` is Python
        if not self._gives_scores(q, k) or not self.writes(line):
            return None
        self.products.add(line)
        return scores.begin(q, k, self.rows)

    def _meet(self, weights: Scores, v: torch.Tensor) -> torch.Tensor:
        out = self.attend(scores.meet(weights, v, self.rows))
        return out if v.dim() == 4 else out.flatten(0, 1)

    def _added_product(
        self,
        input: torch.Tensor,
        batch1: torch.Tensor,
        batch2: torch.Tensor,
        *,
        beta: float = 1.0,
        alpha: float = 1.0,
    ) -> Scores | None:
        product = self._begin(batch1, batch2.transpose(-2, -1))
        if product is None:
            return None
        scaled: Scores = scores.change(torch.mul, (product, alpha), {})
        added: Scores = scores.change(torch.add, (scaled, input), {"alpha": beta})
        return added if beta else scaled

    def _einsum(self, equation: str, *operands: Any) -> Any:
        if isinstance(operands[0], (list, tuple)):
            [operands] = operands
        product = einsum.read(equation, [x.dim() for x in operands])
        if product is None:
            return None
        left, right = operands
        if isinstance(right, Scores) or not (product.of_scores() or isinstance(left, Scores)):
            product, left, right = product.swapped(), right, left
        if isinstance(left, Scores):
            return product.result(self._meet(left, product.values(right)))
        if product.of_scores():
            return self._begin(product.rows(left), product.columns(right))
        return None

    def _gives_scores(self, q: torch.Tensor, k: torch.Tensor) -> bool:
        if q.dim() != k.dim() or q.dim() not in (3, 4) or _is_parameter(k):
            return False
        return q.shape[-2] == k.shape[-2] == self.length

    def _arange(self, line: Line, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        result = torch.arange(*args, **kwargs)
        at = self._placed(line)
        if at is not None:
            return at.to(result.dtype)
        if self._notes(line):
            self._note(line, result.tolist() == list(range(self.length)))
        return result

    def _slice(self, line: Line, table: torch.Tensor, index: Any) -> torch.Tensor:
        parts = index if isinstance(index, tuple) else (index,)
        at = self._placed(line)
        if at is not None:
            return table.index_select(self._cut(parts)[0], at)
        if self._notes(line):
            self._note(line, self._counts(table, parts))
        return table[index]

    def _cut(self, parts: tuple[Any, ...]) -> list[int]:
        """The dimensions that keep as many entries as there are tokens, the first ones."""
        return [dim for dim, part in enumerate(parts) if _first(part, self.length)]

    def _counts(self, table: torch.Tensor, parts: tuple[Any, ...]) -> bool:
        """Whether `table[parts]` are the first entries of one dimension, one for each token."""
        cut = self._cut(parts)
        whole = all(
            isinstance(part, slice) and part == slice(None)
            for dim, part in enumerate(parts)
            if dim not in cut
        )
        return len(cut) == 1 and whole and table.shape[cut[0]] > self.length

    def _placed(self, line: Line) -> torch.Tensor | None:
        return None if self.place is None else self.place(line)

    def _notes(self, line: Line) -> bool:
        """Whether to note this call; those in torch are indices of a mask, not positions."""
        inside = line[0].startswith(_TORCH) or line[0].endswith(_MASKS)
        return self.place is None and not inside

    def _note(self, line: Line, counts: bool) -> None:
        (self.follows if counts else self.others).add(line)


def _weighted(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """A product with a parameter, whose rows then do not depend on how many there are."""
    if func is F.linear and not _caller()[0].startswith(_GRAFT):  # else it is exact already
        return _linear(*args, **kwargs)
    if func not in _PRODUCTS or len(args) != 2 or args[1].dim() != 2 or args[0].dim() < 2:
        return None
    left, right = args
    return linear(left, right.t(), None) if _is_parameter(right) else None


def _linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return linear(input, weight, bias)


def _is_parameter(x: torch.Tensor) -> bool:
    return isinstance(x, torch.nn.Parameter) or isinstance(x._base, torch.nn.Parameter)


def _caller(*skipped: str) -> Line:
    frame: Any = sys._getframe(1)
    while frame.f_code.co_filename.startswith((__file__, *skipped)):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def _first(part: Any, length: int) -> bool:
    start = (None, 0)
    return (
        isinstance(part, slice)
        and part.start in start
        and part.step is None
        and isinstance(part.stop, (int, torch.SymInt))
        and part.stop == length
    )
