"""Serving in eval mode, whatever flags training has set on the user's modules. Torch only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_pre_hook,
    register_module_module_registration_hook,
)


class _Structure:
    """Counts changes to any module tree, so that kept lists of modules know when they are old."""

    changes = 0


def _count_change(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    _Structure.changes += 1


register_module_module_registration_hook(_count_change)


class EvalMode:
    """The modules of a served model whose flags matter; the others are not looked at in a step.

    Args:
        model: the user's.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._as_of = -1
        self._all: list[nn.Module] = []
        self._telling: list[dict[str, Any]] = []
        self._of_logits: list[nn.Module] | None = None

    def modules(self) -> list[nn.Module]:
        """All modules of the model as it is now."""
        if self._as_of != _Structure.changes:
            self._as_of = _Structure.changes
            self._all, self._of_logits = list(self._model.modules()), None
            self._telling = [vars(module) for module in self._all if _tells(module)]
        return self._all

    def in_training(self) -> list[nn.Module]:
        """All modules if one that matters is in training mode, else none."""
        every = self.modules()
        return every if any(attributes["training"] for attributes in self._telling) else []

    def logits(
        self, compute: Callable[[torch.Tensor], torch.Tensor], hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """`compute(hidden_states)` with the modules that it calls in eval mode."""
        every = self.modules()
        if self._of_logits is not None:
            with evaluating(self._of_logits):
                return compute(hidden_states)
        ran: list[nn.Module] = []
        handle = register_module_forward_pre_hook(lambda module, _: ran.append(module))
        try:
            with evaluating(every):
                logits = compute(hidden_states)
        finally:
            handle.remove()
        self._of_logits = list(dict.fromkeys(ran))
        return logits


_ALIKE = (nn.Linear, nn.Embedding, nn.RMSNorm, nn.LayerNorm, nn.SiLU)
"""Two thirds of a model: they compute the same in both modes."""


def _tells(module: nn.Module) -> bool:
    """Whether the flag of `module` matters by itself; looking at flags takes time in each step."""
    return not any(type(module).forward is kind.forward for kind in _ALIKE)


@contextmanager
def evaluating(modules: list[nn.Module]) -> Iterator[None]:
    """Run in eval mode and give back the training flags; free when none is set."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
