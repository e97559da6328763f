"""An original whose attention torch cannot run here, with only that call written out.

Legend: B sequences, L length, N query heads, H head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.attention.varlen import varlen_attn

from vllm_graft.families import flash_attn
from vllm_graft.families.calls import AttentionCall, settled
from vllm_graft.families.flex import flex, varlen
from vllm_graft.families.visible import Watch


class WrittenOut(Watch):
    """Answers what has no kernel on CPU by `softmax(q @ k^T) @ v` under the same mask.

    That is `varlen_attn`, flash-attn, and `flex_attention` where a gradient is wanted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.replaced: set[str] = set()
        """What was answered."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is varlen_attn and args[0].device.type == "cpu":
            self.replaced.add("varlen_attn")
            return varlen(written_out, len(args[0]), *args, **kwargs)
        flash = flash_attn.handler(func)
        if flash is not None and args[0].device.type == "cpu":
            self.replaced.add("flash-attn")
            return flash(written_out, len(args[0]), *args, **kwargs)
        if func is flex_attention and _trains_on_cpu(flex(*args, **kwargs)):
            self.replaced.add("gradient of flex_attention")
            return written_out(flex(*args, **kwargs))
        return func(*args, **kwargs)


def _trains_on_cpu(call: AttentionCall) -> bool:
    inputs = (call.q, call.k, call.v)
    return call.q.device.type == "cpu" and any(x.requires_grad for x in inputs)


def written_out(call: AttentionCall) -> torch.Tensor:
    """The call's result `[B, N, L, H]`, with gradient."""
    call = settled(call)
    groups = call.q.shape[1] // call.k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (call.k, call.v))
    scores = call.q @ k.transpose(-2, -1) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    for add in call.adds:
        scores = scores + add()
    hidden = [hides() for hides in call.hides]
    if call.is_causal:
        hidden.append(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1))
    for mask in hidden:
        scores = scores.masked_fill(mask, float("-inf"))
    return scores.softmax(-1) @ v
