"""The two sides of a comparison: token ids in, full-vocabulary log-probs out. Torch only.

Legend: T tokens of all prompts one after another, V vocabulary, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vllm_graft.doctor.anatomy import Spot, spots
from vllm_graft.positions import packed

Prompts = Sequence[Sequence[int]]


@dataclass
class Trace:
    """What one side computed for all prompts."""

    logprobs: torch.Tensor
    """`[T, V]` float32."""
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    """By role `[T, D]`: what the embedding, each attention and each layer returned."""
    names: dict[str, str] = field(default_factory=dict)
    """By role: the module's name."""


@dataclass(frozen=True)
class LeftOut:
    """Something that a comparison says nothing about."""

    what: str
    """A path, "layers", "gradients", "diagnosis", or a function of the reference's."""
    why: str


class Reference(ABC):
    """The model that is right: log-probs are what every reference gives."""

    kind: str
    """As `--reference` names it."""

    @abstractmethod
    def logprobs(self, sequences: Iterable[Sequence[int]]) -> list[torch.Tensor]:
        """Float32 log-probs `[L, V]` of each token list, without gradient."""

    @abstractmethod
    def update(self, factor: float, exported: Path) -> None:
        """Follow the port after every parameter of it was multiplied by `factor`.

        Args:
            factor: for the reference's own parameters, if it has them.
            exported: the updated port as a Hugging Face folder, for a reference that has not.
        """

    @abstractmethod
    def left_out(self) -> list[LeftOut]:
        """What it did not give, once all has been asked of it."""


class ModuleReference(Reference):
    """A right model in this process, which has layers and gradients too.

    Args:
        module: hooks go onto its modules.
        logits: token ids `[L]` to logits `[L, V]`, with gradient.
        kind: `"original"`, `"transformers"`.
        replaced: what of torch's attention was written out in its stead; `logits` adds to it.
    """

    def __init__(
        self,
        module: nn.Module,
        logits: Callable[[torch.Tensor], torch.Tensor],
        kind: str,
        replaced: Set[str] = frozenset(),
    ) -> None:
        self.module, self._logits, self.kind, self._replaced = module, logits, kind, replaced

    def logits(self, prompts: Prompts) -> torch.Tensor:
        """Logits `[T, V]`, with gradient."""
        return torch.cat([self._logits(torch.tensor(p)) for p in prompts]).float()

    def logprobs(self, sequences: Iterable[Sequence[int]]) -> list[torch.Tensor]:
        """See `Reference`."""
        with torch.no_grad():
            return [self.logits([each]).log_softmax(-1) for each in sequences]

    def update(self, factor: float, exported: Path) -> None:
        """See `Reference`; `exported` is not looked at."""
        scale_parameters(self.module, factor)

    def left_out(self) -> list[LeftOut]:
        """See `Reference`."""
        why = "torch has no kernel here, so softmax(q @ k^T) @ v under the same mask ran instead"
        return [LeftOut(f"{what}, of the original", why) for what in sorted(self._replaced)]


def scale_parameters(module: nn.Module, factor: float) -> None:
    """Multiply every parameter in place: an update that needs no names."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(factor)


class Adapted:
    """The user's module as it trains: one packed forward over all prompts.

    Args:
        module: has `compute_logits`.
        hidden: tokens `[T]` and their positions to hidden states `[T, D]`; default: the
            module's own forward.
    """

    def __init__(self, module: Any, hidden: Callable[..., torch.Tensor] | None = None) -> None:
        self.module = module
        self._hidden = hidden or module

    def logits(self, prompts: Prompts) -> torch.Tensor:
        """Logits `[T, V]`, with gradient."""
        borders = torch.tensor([0, *(len(p) for p in prompts)]).cumsum(0)
        tokens = torch.tensor([t for p in prompts for t in p])
        positions = torch.cat([torch.arange(len(p)) for p in prompts])
        with packed(borders):
            hidden = self._hidden(tokens, positions=positions)
        logits: torch.Tensor = self.module.compute_logits(hidden)
        return logits.float()


def trace(side: ModuleReference | Adapted, prompts: Prompts) -> Trace:
    """Log-probs and the value at every spot, without gradient."""
    found = list(spots(side.module))
    kept: dict[str, list[torch.Tensor]] = {spot.role: [] for spot in found}
    with torch.no_grad(), evaluating(side.module), _recording(found, kept):
        logprobs = side.logits(prompts).log_softmax(-1)
    values = {role: torch.cat(rows) for role, rows in kept.items() if rows}
    return Trace(logprobs, values, {spot.role: spot.name for spot in found})


@contextmanager
def _recording(found: list[Spot], kept: dict[str, list[torch.Tensor]]) -> Iterator[None]:
    with ExitStack() as stack:
        for spot in found:
            stack.callback(spot.module.register_forward_hook(_keep(kept[spot.role])).remove)
        yield


def _keep(rows: list[torch.Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        rows.append(first.detach().float().reshape(-1, first.shape[-1]).clone())

    return hook


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode in the block, for those modules that were training."""
    training = [each for each in module.modules() if each.training]
    module.eval()
    try:
        yield
    finally:
        for each in training:
            each.training = True
