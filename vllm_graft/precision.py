"""Tables that keep their precision when a model is built and cast."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

TABLE_NAME = re.compile(
    r"(^|_)(freqs?|rope|rotary|cos|sin)(_|$)"
    r"|^((expert_bias|tokens_per_expert)(_E)?|e_score_correction_bias)$"
)
"""Buffers that lose their meaning in bf16: RoPE tables, router biases and token counts."""


def keep_table_precision(model: nn.Module, extra: dict[nn.Module, set[str]]) -> None:
    """Make RoPE tables and router biases survive a later `.to(dtype)`.

    A cast would drop the imaginary part of a complex table and round a
    cos|sin one by 2e-3. Protected buffers still follow the model's device.

    Args:
        model: searched for complex buffers and names like `TABLE_NAME`.
        extra: more buffers to protect, by the module that owns them.
    """
    for module in model.modules():
        names = set(extra.get(module, ()))
        for name, buffer in module._buffers.items():
            if buffer is not None and (buffer.is_complex() or TABLE_NAME.search(name)):
                names.add(name)
        if names:
            module.__dict__.setdefault("_graft_kept", set()).update(names)
            module._apply = partial(_apply_keeping, module)  # type: ignore[method-assign]


def _apply_keeping(module: nn.Module, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` that moves the kept buffers without casting them."""
    kept: dict[str, Any] = {
        name: module._buffers.pop(name)
        for name in module._graft_kept  # type: ignore[union-attr]
        if module._buffers.get(name) is not None
    }
    persistent = set(module._non_persistent_buffers_set)
    type(module)._apply(module, fn, recurse)
    device = fn(torch.empty(0)).device
    for name, table in kept.items():
        fresh = table.is_meta or device.type == "meta"
        module._buffers[name] = (
            torch.empty_like(table, device=device) if fresh else table.to(device)
        )
    module._non_persistent_buffers_set = persistent
    return module


@contextmanager
def parameters_as(dtype: torch.dtype) -> Iterator[None]:
    """Build a model whose parameters have `dtype` while tables stay float32.

    vLLM builds models with the served dtype as torch's default, in which a
    table like `1 / theta ** (torch.arange(0, d, 2) / d)` is garbage. Here the
    default stays float32 and each parameter is cast as it is registered, so
    that no float32 copy of the whole model ever exists.
    """
    before, register = torch.get_default_dtype(), nn.Module.register_parameter

    def register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.dtype == torch.float32:
            param.data = param.data.to(dtype)
        register(self, name, param)

    torch.set_default_dtype(torch.float32)
    nn.Module.register_parameter = register_parameter  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
        torch.set_default_dtype(before)
