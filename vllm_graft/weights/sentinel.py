"""Finding parameters that a load never wrote, however it writes.

A loader may return nothing, write through `.data`, or report names it did not
touch. So a few elements of each parameter are set to NaN beforehand: where
they are still NaN afterwards, nothing was written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

_SAMPLES = 64


@dataclass
class _Mark:
    tensor: torch.Tensor
    indices: torch.Tensor
    before: torch.Tensor


class Sentinels:
    """NaN marks in up to 64 places of every floating-point parameter.

    A stack (3 dimensions or more) has one in each row as well, since experts are
    written one by one.

    Args:
        tensors: parameters by name; tied ones under several names count once.
            Meta, integer, 8-bit and expanded tensors are left alone.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._marks: dict[str, _Mark] = {}
        seen: set[int] = set()
        for name, tensor in tensors.items():
            if self.can_mark(tensor) and id(tensor) not in seen:
                seen.add(id(tensor))
                self._marks[name] = _mark(_local(tensor))

    @staticmethod
    def can_mark(tensor: torch.Tensor) -> bool:
        """Whether a tensor can hold marks, see the class."""
        return _markable(_local(tensor))

    def unwritten(self) -> dict[str, str]:
        """Parameters with marks left: `{name: "missing" | "only partly written"}`."""
        found = {}
        for name, mark in self._marks.items():
            left = torch.isnan(mark.tensor.take(mark.indices))
            if bool(left.any()):
                found[name] = "missing" if bool(left.all()) else "only partly written"
        return found

    def remove(self) -> None:
        """Put back the values under the marks that are left."""
        for mark in self._marks.values():
            now = mark.tensor.take(mark.indices)
            mark.tensor.put_(mark.indices, torch.where(torch.isnan(now), mark.before, now))


def _markable(local: torch.Tensor) -> bool:
    wide_float = local.is_floating_point() and local.element_size() > 1
    one_place_per_element = 0 not in local.stride() or local.numel() == 1
    return wide_float and one_place_per_element and not local.is_meta and local.numel() > 0


def _mark(local: torch.Tensor) -> _Mark:
    last = local.numel() - 1
    count = min(_SAMPLES, local.numel())
    places = torch.linspace(0, last, count, dtype=torch.float64).round().long()
    if local.dim() > 2:
        rows = torch.arange(local.shape[0]) * (local.numel() // local.shape[0])
        places = torch.cat([places, rows])
    indices = places.unique().to(local.device)
    mark = _Mark(local, indices, local.take(indices).clone())
    local.put_(indices, torch.full_like(mark.before, float("nan")))
    return mark


def _local(tensor: Any) -> torch.Tensor:
    """The plain tensor behind a parameter: a DTensor's shard, detached from autograd."""
    local: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.data
