"""What a correction changes for one forward, and takes back. Torch only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def changed(changes: list[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """Other values in tensors during the block."""
    kept = [(tensor, tensor.detach().clone()) for tensor, _ in changes]
    with torch.no_grad():
        for tensor, value in [(t, v.detach().clone()) for t, v in changes]:
            tensor.copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)


@contextmanager
def hooked(hooks: Sequence[tuple[nn.Module, Callable[[Any], Any]]]) -> Iterator[None]:
    """Other outputs of modules during the block."""
    with ExitStack() as stack:
        for module, change in hooks:

            def hook(_: nn.Module, __: Any, output: Any, change: Any = change) -> Any:
                if isinstance(output, tuple):
                    return (change(output[0]), *output[1:])
                return change(output)

            stack.callback(module.register_forward_hook(hook).remove)
        yield


@contextmanager
def set_to(changes: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Other attributes during the block."""
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in kept:
            setattr(owner, name, value)


@contextmanager
def before(module: nn.Module, hook: Any) -> Iterator[None]:
    """Other arguments of a module during the block."""
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def scaled_queries(factors: Sequence[tuple[nn.Module, float]]) -> Iterator[None]:
    """Other queries for attention modules: another softmax scale, whoever passes the one."""
    with ExitStack() as stack:
        for core, factor in factors:

            def hook(_: nn.Module, args: Any, kwargs: Any, factor: float = factor) -> Any:
                return (args[0] * factor, *args[1:]), kwargs

            stack.enter_context(before(core, hook))
        yield
