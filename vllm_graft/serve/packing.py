"""When the weights of a served model are packed or laid together, again, and released."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vllm_graft import exact, products
from vllm_graft.joined import join_products
from vllm_graft.products import Call, Group, Packer, Seen, unchanged
from vllm_graft.serve import _vllm, _vllm_packed
from vllm_graft.serve.freed import return_freed_memory
from vllm_graft.weights.slots import slots, tensor_in

logger = logging.getLogger("vllm_graft")


class Packing:
    """The packed products of one served model.

    Args:
        model: the user's.
        packer: packs, None where nothing is packed.
        join: whether to lay siblings together that are not packed.
        same: whether packed products must give the very bits of unpacked ones.
        release: whether to give back the memory of weights that are packed.
    """

    def __init__(
        self, model: nn.Module, packer: Packer | None, *, join: bool, same: bool, release: bool
    ) -> None:
        self._model = model
        self._packer = packer
        self._join = join
        self._same = same
        self._packed: list[Group] = []
        self._release = release
        self._seen: list[Seen] = []
        self._as_of = -1
        self.watches = True
        """Whether to look for changed weights before each forward; off where another does."""

    def start(
        self,
        calls: list[Call],
        forward: Callable[[], torch.Tensor],
        inside: Callable[[], list[Group]],
    ) -> None:
        """Pack and join what ran, unless `forward` then gives something else.

        Args:
            calls: the products of a forward.
            forward: hidden states of a few tokens.
            inside: gives packed products inside attention, which `forward` leaves out.
        """
        if not self._join:
            return
        want = forward()
        copies = [] if self._packer is None else products.pack_products(calls, self._packer)
        self._packed += copies
        linear = exact.linear if self._same else F.linear
        shared = _shared(self._model)
        self._packed += join_products(calls, linear, kept_apart=shared, same=self._same)
        if self._packer is not None and self._same:
            self._packed += inside()
        self.ready()
        if self._packer is not None:
            self._packer.settle(copies)
        with products.serving():
            got = forward()  # tries numbers of rows, with weights of its own
        return_freed_memory()
        if self._agree(got, want):
            return
        logger.warning(
            "%s: packed or joined weights give other hidden states; it serves by its own products",
            type(self._model).__name__,
        )
        for packed in self._packed:
            packed.unpack()
        self._packed = []

    def _agree(self, got: torch.Tensor, want: torch.Tensor) -> bool:
        if self._same:
            return torch.equal(got, want)
        # Another order of the sums: float32 differs by 1e-6, bf16 by some roundings, a wrong
        # product by about its own size.
        limit = max(1e-3, 8 * torch.finfo(want.dtype).eps)
        return bool((got - want).abs().max() <= limit * want.abs().max())

    def ready(self) -> None:
        """All weights are new: pack them, and release what nothing else holds."""
        shared = _shared(self._model)
        for packed in self._packed:
            packed.pack()
            if self._release and not packed.shares(shared):
                packed.release()
        if self._release:
            return_freed_memory()

    def before_load(self, *, whole: bool) -> None:
        """Give the parameters memory to write into, and their values unless all will come."""
        for packed in self._packed:
            packed.restore(values=not whole)

    def refresh(self) -> None:
        """Pack anew what changed since the last forward."""
        if not self.watches or (self._as_of == products.looks() and unchanged(self._seen)):
            return
        for packed in self._packed:
            packed.refresh()
        self._as_of = products.looks()
        self._seen = [seen for packed in self._packed for seen in packed.seen()]

    def changed(self) -> None:
        """Pack everything anew, however it was written."""
        for packed in self._packed:
            packed.pack()

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Release nothing before the end of the block: the weights are read there."""
        before, self._release = self._release, False
        try:
            yield
        finally:
            self._release = before
        if before:
            self.ready()


def _shared(model: nn.Module) -> set[int]:
    """Tensors, by id, that have several places in `model`."""
    places: Counter[int] = Counter(id(tensor_in(slot)) for slot in set(slots(model).values()))
    return {tensor for tensor, count in places.items() if count > 1}


def packing_for(model: nn.Module, vllm_config: Any) -> Packing:
    """The packing that this platform has and `vllm_config` asks for."""
    exactly, chosen = _vllm.serves_exactly(vllm_config), _vllm.packing(vllm_config)
    on_cpu = _vllm.platform_device() == "cpu"
    packer = _vllm_packed.CpuPacker(exact=exactly) if on_cpu and chosen != "off" else None
    return Packing(
        model,
        packer,
        join=chosen != "off",
        same=exactly,
        release=chosen == "release",
    )
