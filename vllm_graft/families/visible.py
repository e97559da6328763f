"""Attention functions that are Python, made visible to a function mode as SDPA is.

`flex_attention`, `varlen_attn` and those of flash-attn ask no mode, and models hold them by names
of their own. So the code of the function itself is exchanged, once: it asks a `Watch` that is on,
and does what it did where there is none. Can go when they ask `__torch_function__` themselves
(torch's do not up to 2.13).
"""

from __future__ import annotations

import inspect
import types
from typing import Any

import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.attention.varlen import varlen_attn
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    handle_torch_function,
)

from vllm_graft.families import flash_attn

_STOCK = "graft_stock"


class Watch(TorchFunctionMode):
    """Sees `flex_attention`, `varlen_attn` and flash-attn's functions like any of torch's.

    What a model put under `torch.compile` runs eagerly meanwhile: in compiled code no call is
    seen.
    """

    def __enter__(self) -> Any:
        for function in (flex_attention, varlen_attn, *flash_attn.functions()):
            _make_visible(function)
        self._stance: Any = torch.compiler.set_stance("force_eager")
        mode: Any = super()
        return mode.__enter__()

    def __exit__(self, *error: Any) -> None:
        mode: Any = super()
        mode.__exit__(*error)
        self._stance.__exit__(*error)


def _make_visible(function: Any) -> None:
    """Idempotent. The stock function travels as a default, since code has no closure here."""
    if _STOCK in (function.__kwdefaults__ or {}):
        return
    stock = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__
    )
    stock.__kwdefaults__ = function.__kwdefaults__
    stock.graft_visible = function  # type: ignore[attr-defined]
    function.__signature__ = inspect.signature(function)
    function.__defaults__, function.__kwdefaults__ = None, {_STOCK: stock}
    function.__code__ = _ask.__code__


def _ask(*args: Any, graft_stock: Any, **kwargs: Any) -> Any:
    # Runs with the globals of the function that it stands in for.
    from vllm_graft.families.visible import _answer

    return _answer(graft_stock, args, kwargs)


def _answer(stock: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if torch.compiler.is_compiling() or not _watched():
        return stock(*args, **kwargs)
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
    return handle_torch_function(stock.graft_visible, tensors, *args, **kwargs)


def _watched() -> bool:
    return any(isinstance(mode, Watch) for mode in _get_current_function_mode_stack())
