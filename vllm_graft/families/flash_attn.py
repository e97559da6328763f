"""Calls of the package flash-attn (2.x) in Graft's one form.

The package is built for CUDA only. Nothing of it is imported here: its functions are known by
their names where a model has loaded it.

Legend: as in `flex`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from vllm_graft.families.calls import AttentionCall
from vllm_graft.families.flex import apart, by_rows, outside
from vllm_graft.families.masks import NotUnderstoodError

_MODULE = "flash_attn.flash_attn_interface"
Attend = Callable[[AttentionCall], torch.Tensor]


def functions() -> list[Any]:
    """The package's functions that Graft knows; none where no model has loaded it."""
    module = sys.modules.get(_MODULE)
    return [getattr(module, name) for name in _HANDLERS if hasattr(module, name)]


def handler(function: Any) -> Callable[..., torch.Tensor] | None:
    """What answers a call of `function`, given `attend` and L before its arguments."""
    if getattr(function, "__module__", None) != _MODULE:
        return None
    return _HANDLERS.get(function.__name__)


def _dense(
    attend: Attend,
    length: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """`flash_attn_func` on `[B, L, N, H]`."""
    call, window = _asked(
        (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)), *args, **kwargs
    )
    at = torch.arange(q.shape[1], device=q.device)
    limited = window[0] >= 0 or window[1] > 0
    hides = (lambda: outside(at, window),) if limited else ()
    return attend(replace(call, hides=hides, is_causal=window == (-1, 0))).transpose(1, 2)


def _qkv_packed(attend: Attend, length: int, qkv: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """`flash_attn_qkvpacked_func` on `[B, L, 3, N, H]`."""
    q, k, v = qkv.unbind(2)
    return _dense(attend, length, q, k, v, *args, **kwargs)


def _kv_packed(
    attend: Attend, length: int, q: torch.Tensor, kv: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """`flash_attn_kvpacked_func` on `[B, L, N, H]` and `[B, L, 2, K, H]`."""
    k, v = kv.unbind(2)
    return _dense(attend, length, q, k, v, *args, **kwargs)


def _varlen(
    attend: Attend,
    length: int,
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """`flash_attn_varlen_func`, all rows one after another."""
    call, window = _asked((q_TNH, k_TKH, v_TKH), *args, **kwargs)
    hides = (lambda: apart(cu_seqlens_q, cu_seqlens_k, len(q_TNH), window),)
    return by_rows(attend, length, replace(call, hides=hides))


def _asked(
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    **rest: Any,
) -> tuple[AttentionCall, tuple[int, int]]:
    """What all functions take behind their tensors: a call without a mask, and the window."""
    _refuse(rest)
    q, k, v = qkv
    length = q.shape[2] if q.dim() == 4 else q.shape[0]
    adds = () if alibi_slopes is None else (lambda: _alibi(alibi_slopes, length),)
    call = AttentionCall(
        q=q,
        k=k,
        v=v,
        scale=q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        softcap=softcap or None,
        dropout=dropout_p,
        adds=adds,
    )
    left, right = window_size
    return call, (left, 0 if causal else right)


def _alibi(slopes_N: torch.Tensor, length: int) -> torch.Tensor:
    """`[N, L, L]`, or `[B, N, L, L]` of `[B, N]`: what flash-attn adds for those slopes."""
    at = torch.arange(length, device=slopes_N.device)
    return -slopes_N[..., None, None] * (at[:, None] - at).abs()


def _refuse(options: dict[str, Any]) -> None:
    """Raise for options that change the result; `deterministic` changes the backward's order."""
    given = [name for name, value in options.items() if name != "deterministic"
             and value is not None and value is not False]  # fmt: skip
    if given:
        raise NotUnderstoodError(f"flash-attn with {', '.join(given)}")


_HANDLERS: dict[str, Callable[..., torch.Tensor]] = {
    "flash_attn_func": _dense,
    "flash_attn_qkvpacked_func": _qkv_packed,
    "flash_attn_kvpacked_func": _kv_packed,
    "flash_attn_varlen_func": _varlen,
}
