"""Layers that read the same input, their weights one behind the other in one storage.

The parameters are views of it under their own names, so an optimizer's step needs no copy,
exports see them apart, and the engine runs one product in place of several. What moves a
parameter elsewhere (`.to`, `.data = `, a reload) is noticed before the next forward, and the
weights are laid together again.

Torch only. Legend: `[..., K]` inputs, `[..., M]` outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from vllm_graft.products import ATTRIBUTE, Call, Group, is_plain, siblings
from vllm_graft.tiles import cancelling

Linear = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]
"""`F.linear` or `exact.linear`."""

_TRIED_ROWS = (1, 2, 3, 4, 7, 8, 12, 16, 40, 129)


class Joined(Group):
    """Layers whose weights, and biases, are views of one storage."""

    def __init__(self, members: Sequence[Call], linear: Linear) -> None:
        super().__init__(members)
        self._linear = linear
        first = self._weights[0].detach()
        # Compiled code holds these very tensors.
        self._weight = first.new_empty(sum(self._rows), first.shape[1])
        if self._with_bias:
            self._bias = first.new_empty(sum(self._rows))

    def multiply(
        self, x: torch.Tensor, counts: torch.Tensor | None = None
    ) -> Sequence[torch.Tensor]:
        """By all weights at once."""
        out: torch.Tensor = self._linear(x, self._weight, self._bias)
        parts: Sequence[torch.Tensor] = out.split(self._rows, -1)
        return parts

    def pack(self) -> None:
        """Lay together what lies elsewhere."""
        self._input = self._outputs = None
        self._weights = [member.weight for member in self._members]
        with torch.inference_mode(False), torch.no_grad():
            self._lay(self._weights, self._weight)
            if self._bias is not None:
                self._lay([member.bias for member in self._members], self._bias)
        self._seen = self._look()

    def _lay(self, tensors: Sequence[nn.Parameter], storage: torch.Tensor) -> None:
        for tensor, part in zip(tensors, storage.split(self._rows), strict=True):
            if tensor.data_ptr() != part.data_ptr():
                part.copy_(tensor)
                tensor.data = part

    def same_as_apart(self) -> bool:
        """Whether each member has the bits of its own product, tried with numbers that cancel."""
        with torch.inference_mode(False), torch.no_grad():
            weight = cancelling(self._weight.shape, torch.float32, seed=0).to(self._weight)
            x = cancelling((_TRIED_ROWS[-1], weight.shape[1]), torch.float32, seed=1).to(weight)
            return all(self._agree(x[:rows], weight) for rows in _TRIED_ROWS)

    def _agree(self, x: torch.Tensor, weight: torch.Tensor) -> bool:
        together = self._linear(x, weight, None).split(self._rows, -1)
        apart = [self._linear(x, part, None) for part in weight.split(self._rows)]
        return all(map(torch.equal, together, apart))

    def unpack(self) -> None:
        """Undo it all: each parameter gets memory of its own."""
        super().unpack()
        names = ("weight", "bias") if self._with_bias else ("weight",)
        for member in self._members:
            for name in names:
                parameter = getattr(member, name)
                parameter.data = parameter.detach().clone()


def join_products(
    calls: Iterable[Call], linear: Linear, *, kept_apart: set[int], same: bool
) -> list[Joined]:
    """Siblings among the layers that ran, laid together.

    Args:
        calls: the products of a forward.
        linear: the product.
        kept_apart: tensors, by id, that have several places in the model.
        same: whether each layer must keep the very bits of its own product.
    """
    waiting = [call for call in calls if not hasattr(call.module, ATTRIBUTE)]
    joined = []
    for members in siblings(
        waiting, lambda weight: _plain(weight) and id(weight) not in kept_apart
    ):
        if len(members) < 2 or not _fit([call.module for call in members], members[0].with_bias):
            continue
        group = Joined(members, linear)
        group.pack()
        if same and not group.same_as_apart():
            group.unpack()
            continue
        joined.append(group)
    return joined


def _plain(weight: torch.Tensor) -> bool:
    """Whether this is a matrix of a whole parameter, no shard that knows of a mesh."""
    return is_plain(weight) and weight.dim() == 2 and weight.is_contiguous()


def _fit(members: Sequence[Any], with_bias: bool) -> bool:
    """Whether weights (and biases) can lie in one storage."""
    tensors = [m.weight for m in members] + ([m.bias for m in members] if with_bias else [])
    alike = {(tensor.dtype, tensor.device) for tensor in tensors}
    return len(alike) == 1 and len({m.weight.shape[1] for m in members}) == 1
