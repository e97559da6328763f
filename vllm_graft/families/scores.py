"""Attention that a model writes out, `softmax(q @ k^T * scale + mask) @ v`, read as one call.

The product of queries and keys is not computed. A `Scores` stands in for it and remembers
what the model does to it, until it meets the values.

Legend: B sequences, L length, N query heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from vllm_graft.families.calls import AttentionCall
from vllm_graft.families.masks import HIDES, NotUnderstoodError


class Scores(torch.Tensor):
    """Scores, or after the softmax weights, of the shape they would have, without numbers."""

    call: AttentionCall
    softmaxed: bool
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(  # noqa: D102
        cls, call: AttentionCall, shape: torch.Size, softmaxed: bool = False
    ) -> Scores:
        q = call.q
        scores: Any = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=q.dtype, device=q.device
        )
        scores.call, scores.softmaxed = call, softmaxed
        return scores  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, *_: Any, **__: Any
    ) -> Any:
        raise NotUnderstoodError(
            f"{func.overloadpacket.__name__} of attention scores is not understood"
        )


def begin(q: torch.Tensor, k: torch.Tensor, rows: int) -> Scores:
    """The scores of q and k, `[B, N, L, H]` or `[B * N, L, H]` for B rows."""
    shape = torch.Size([*q.shape[:-1], k.shape[-2]])
    q, k = (apart(x, rows) for x in (q, k))
    return Scores(AttentionCall(q=q, k=k, v=k), shape)


def apart(x: torch.Tensor, rows: int) -> torch.Tensor:
    """`[B, N, L, H]` of that, or of `[B * N, L, H]` for B rows.

    Raises:
        NotUnderstoodError: several rows whose heads may lie in either order.
    """
    if x.dim() == 4:
        return x
    if rows > 1 and len(x) != rows:
        raise NotUnderstoodError(
            f"attention on {tuple(x.shape)}: heads and {rows} rows in one dimension; give samples "
            "in one row, inside vllm_graft.packed(...)"
        )
    unfolded: torch.Tensor = x.unflatten(0, (rows, -1))
    return unfolded


def meet(scores: Scores, v: torch.Tensor, rows: int) -> AttentionCall:
    """The call that `scores` have become when they meet the values, of a shape like q's.

    Raises:
        NotUnderstoodError: before a softmax.
    """
    if not scores.softmaxed:
        raise NotUnderstoodError("attention scores meet the values without a softmax")
    return replace(scores.call, v=apart(v, rows))


def follow(function: Callable[..., Any], *args: Any) -> Any:
    """What a function of the model's makes of its arguments, `Scores` among them.

    Raises:
        NotUnderstoodError: it takes a step that is not understood.
    """
    with _Following():
        return function(*args)


class _Following(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        step = change if any(isinstance(x, Scores) for x in args) else _call
        return step(func, args, kwargs or {})


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


def change(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `func`, called by the model on a `Scores`, makes of it.

    Raises:
        NotUnderstoodError: it is not a step of attention that is understood.
    """
    if func in _ATTRIBUTES or getattr(func, "__name__", "") == "__get__":
        return func(*args, **kwargs)
    step = _STEPS.get(func)
    if step is None:
        name = getattr(func, "__name__", str(func))
        raise NotUnderstoodError(f"{name} of attention scores is not understood")
    name = func.__name__
    at = next(i for i, x in enumerate(args) if isinstance(x, Scores))
    if at and step not in (_multiply, _add, _where):
        raise NotUnderstoodError(f"{name} with attention scores as argument {at} is not understood")
    scores = args[at]
    rest = args[:at] + args[at + 1 :]
    if func is torch.where and at == 2:
        rest = (~args[0], args[1])
    changed = step(scores, *rest, **kwargs)
    inside = name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
    if not inside:
        return changed
    scores.call, scores.softmaxed = changed.call, changed.softmaxed
    return scores


def _with(scores: Scores, **changes: Any) -> Scores:
    return Scores(replace(scores.call, **changes), scores.shape, scores.softmaxed)


def _before_softmax(scores: Scores) -> AttentionCall:
    if scores.softmaxed:
        raise NotUnderstoodError("attention weights are changed after the softmax")
    return scores.call


def _number(factor: Any) -> float:
    if not isinstance(factor, torch.Tensor):
        return float(factor)
    if factor.dim() or factor.requires_grad:
        raise NotUnderstoodError(
            f"scores are scaled by a tensor {tuple(factor.shape)}, learned or not one number"
        )
    return float(factor)


def _multiply(scores: Scores, factor: Any) -> Scores:
    call, number = _before_softmax(scores), _number(factor)
    adds = tuple(partial(_times, add, number) for add in call.adds)
    if call.softcap is not None:
        softcap = call.softcap * number
        return _with(scores, scale=call.scale * number, softcap=softcap, adds=adds)
    return _with(scores, scale=call.scale * number, adds=adds)


def _times(add: Callable[[], torch.Tensor], number: float) -> torch.Tensor:
    return add() * number


def _divide(scores: Scores, factor: Any) -> Scores:
    return _multiply(scores, 1.0 / _number(factor))


def _tanh(scores: Scores) -> Scores:
    call = _before_softmax(scores)
    if call.softcap is not None or call.hides or call.adds:
        raise NotUnderstoodError("tanh of attention scores comes twice, or after a mask or a bias")
    return _with(scores, softcap=1.0)


def _hide(scores: Scores, mask: torch.Tensor, value: Any) -> Scores:
    def hidden() -> torch.Tensor:
        if float(value) > HIDES:
            raise NotUnderstoodError(f"masked scores become {value}, which has weight in a softmax")
        return mask

    return _with(scores, hides=(*_before_softmax(scores).hides, hidden))


def _where(scores: Scores, mask: torch.Tensor, value: Any) -> Scores:
    return _hide(scores, ~mask, value)


def _add(scores: Scores, other: Any, alpha: float = 1.0) -> Scores:
    added = alpha * torch.as_tensor(other)
    return _with(scores, adds=(*_before_softmax(scores).adds, lambda: added))


def _subtract(scores: Scores, other: Any, alpha: float = 1.0) -> Scores:
    return _add(scores, other, -alpha)


def _softmax(scores: Scores, dim: int | None = None, *_: Any, **__: Any) -> Scores:
    if dim not in (-1, scores.dim() - 1):
        raise NotUnderstoodError(
            f"softmax over dimension {dim} of attention scores, not over the keys"
        )
    return Scores(_before_softmax(scores), scores.shape, softmaxed=True)


def _dropout(
    scores: Scores, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Scores:
    if not scores.softmaxed and training and p:
        raise NotUnderstoodError("dropout of attention scores before the softmax")
    return _with(scores, dropout=float(p) if training else 0.0)


def _view(scores: Scores, *shape: Any) -> Scores:
    new = torch.empty(scores.shape, device="meta").view(*shape).shape
    if new[-2:] != scores.shape[-2:]:
        raise NotUnderstoodError(f"attention scores {tuple(scores.shape)} become {tuple(new)}")
    return Scores(scores.call, new, scores.softmaxed)


def _same(scores: Scores, *_: Any, **__: Any) -> Scores:
    return scores


_ATTRIBUTES = {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.is_floating_point}
_STEPS: dict[Any, Callable[..., Scores]] = {
    **dict.fromkeys(
        (torch.mul, torch.Tensor.mul, torch.Tensor.mul_, torch.Tensor.__mul__,
         torch.Tensor.__rmul__, torch.Tensor.__imul__), _multiply,
    ),
    **dict.fromkeys(
        (torch.div, torch.Tensor.div, torch.Tensor.div_, torch.Tensor.__truediv__,
         torch.Tensor.__itruediv__), _divide,
    ),
    **dict.fromkeys(
        (torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__add__,
         torch.Tensor.__radd__, torch.Tensor.__iadd__), _add,
    ),
    **dict.fromkeys(
        (torch.sub, torch.Tensor.sub, torch.Tensor.sub_, torch.Tensor.__sub__,
         torch.Tensor.__isub__), _subtract,
    ),
    **dict.fromkeys((torch.tanh, torch.Tensor.tanh, F.tanh), _tanh),
    **dict.fromkeys(
        (torch.masked_fill, torch.Tensor.masked_fill, torch.Tensor.masked_fill_), _hide
    ),
    torch.where: _where,
    **dict.fromkeys((torch.softmax, torch.Tensor.softmax, F.softmax), _softmax),
    F.dropout: _dropout,
    **dict.fromkeys((torch.Tensor.view, torch.Tensor.reshape), _view),
    **dict.fromkeys(
        (torch.Tensor.float, torch.Tensor.to, torch.Tensor.type_as, torch.Tensor.contiguous), _same
    ),
}  # fmt: skip
