"""Whether the weights of a live module changed, by whatever route. Torch only."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from vllm_graft.train.digest import digest
from vllm_graft.weights.errors import WeightError
from vllm_graft.weights.shards import local
from vllm_graft.weights.slots import slots

_SHOWN = 8


@dataclass(slots=True)
class _Seen:
    """A tensor as it was when it was last looked at."""

    name: str
    tensor: torch.Tensor
    own: torch.Tensor
    """Its values on this rank."""
    shape: torch.Size
    version: int
    address: int
    holders: list[tuple[dict[str, Any], str]]
    """Where modules keep it: their dicts of parameters or buffers, and the keys."""
    digest: int | None = None

    def in_place(self) -> bool:
        """Whether the model still holds this very tensor, under each of its names."""
        # Asked of every tensor before every step; `all` and a generator take half as long again.
        for held, key in self.holders:  # noqa: SIM110
            if held.get(key) is not self.tensor:
                return False
        return True

    def unchanged(self) -> bool:
        """Whether it is in place and no operation has written into it."""
        own = self.own
        same = own._version == self.version and own.data_ptr() == self.address
        return same and own.shape == self.shape and self.in_place()


class WeightWatch:
    """Remembers the parameters and buffers of `model` and says when they are others.

    Versions catch in-place operations and cost microseconds. The kernels of fused
    optimizers leave them as they are: a hook after each optimizer's step notes those.
    What is written through `.data`, or by other code on the same memory, is caught by a
    digest over all bytes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen = self._look()
        self._digests_differ()
        self._stepped = False
        _note_steps_to(self)

    def note_step(self, optimizer: Optimizer) -> None:
        """Take the parameters as changed if `optimizer` has any of them."""
        watched = {id(seen.tensor) for seen in self._seen}
        held = (id(p) for group in optimizer.param_groups for p in group["params"])
        self._stepped |= not watched.isdisjoint(held)

    def changed(self, *, thorough: bool) -> bool:
        """Whether any value changed since the last call that found a change.

        Args:
            thorough: compare the digest of all bytes too, one pass over the weights.

        Raises:
            WeightError: a parameter was replaced by another tensor or changed its shape.
        """
        if self._stepped or not all(seen.unchanged() for seen in self._seen):
            self._check_parameters()
            self._seen = self._look()
            self._digests_differ()
            self._stepped = False
            return True
        return thorough and self._digests_differ()

    def check_finite(self) -> None:
        """Refuse weights that are not numbers.

        Raises:
            WeightError: naming the parameters with NaN or infinite values.
        """
        bad = [s.name for s in self._parameters() if not is_finite(s.own)]
        if bad:
            raise WeightError(
                f"NaN or infinite values in {listed(bad)}: the weights are not served. "
                "Write finite values to go on"
            )

    def _parameters(self) -> list[_Seen]:
        return [seen for seen in self._seen if isinstance(seen.tensor, nn.Parameter)]

    def _check_parameters(self) -> None:
        parameters = self._parameters()
        replaced = [seen.name for seen in parameters if not seen.in_place()]
        if replaced:
            raise WeightError(
                f"parameters replaced by other tensor objects: {listed(replaced)}. The engine "
                "and the optimizer hold the old ones: put those back and write into them with "
                "copy_, not by assignment or load_state_dict(assign=True)"
            )
        for seen in parameters:
            shape = local(seen.tensor).shape
            if shape != seen.shape:
                raise WeightError(
                    f"{seen.name} changed its shape from {tuple(seen.shape)} to {tuple(shape)} "
                    "under a running engine; give it its old shape back"
                )

    def _look(self) -> list[_Seen]:
        found: dict[int, _Seen] = {}
        for name, (module, attribute) in slots(self._model).items():
            tensor = getattr(module, attribute)
            own = local(tensor)
            fresh = _Seen(name, tensor, own, own.shape, own._version, own.data_ptr(), [])
            held: Any = module._parameters if attribute in module._parameters else module._buffers
            found.setdefault(id(tensor), fresh).holders.append((held, attribute))
        return list(found.values())

    def _digests_differ(self) -> bool:
        """Bring the digests up to date; whether one is another than before."""
        changed = False
        for seen in self._seen:
            before, seen.digest = seen.digest, digest(seen.own)
            changed |= before is not None and before != seen.digest
        return changed


def _note_steps_to(watch: WeightWatch) -> None:
    """Tell `watch` of every optimizer's steps, as long as it lives."""
    weak = weakref.ref(watch)

    def note(optimizer: Optimizer, *_: Any) -> None:
        alive = weak()
        if alive is not None:
            alive.note_step(optimizer)

    handle = register_optimizer_step_post_hook(note)
    weakref.finalize(watch, handle.remove)


@torch.no_grad()
def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are numbers and finite."""
    # A sum is one fast pass and shows every NaN and infinity; its own overflow is looked into.
    if not tensor.is_floating_point() or bool(torch.isfinite(tensor.sum())):
        return True
    return bool(torch.isfinite(tensor).all())


def listed(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
