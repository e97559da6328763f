"""`push_weights`: the weights of a separate trainer, into a running engine."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import nn

from vllm_graft.train.digest import compare, digest
from vllm_graft.train.segment import ALIGNMENT, Segment, nbytes
from vllm_graft.train.segment_cuda import CardSegment, card_of
from vllm_graft.train.targets import Target, target_of
from vllm_graft.train.watch import is_finite, listed
from vllm_graft.weights.contents import Contents
from vllm_graft.weights.errors import WeightError, failure_of
from vllm_graft.weights.mapping import NameMapping
from vllm_graft.weights.shards import local

CHUNK = 64 << 20
"""Bytes of memory in between, unless one tensor needs more."""

T = TypeVar("T")
Described = dict[str, tuple[torch.dtype, torch.Size]]


def push_weights(
    trainer_model: nn.Module,
    target: Any,
    name_mapping: NameMapping | None = None,
    *,
    api_key: str | None = None,
) -> None:
    """Send the weights of `trainer_model` to an engine on this host, through memory both can see.

    That is shared memory of the host, or of the trainer's card (CUDA IPC) where the engine's
    workers are other processes and see that card.

    Both sides speak checkpoint names: sharded tensors (FSDP2, DTensor, tensor parallel) are
    gathered one by one, in chunks of 64 MiB or the largest tensor, in the engine's dtype. The
    engine loads them by the mapping that loads checkpoints, drops its prefix cache, and
    serves them once the digest of every tensor is equal on both sides.

    Under torchrun every rank calls it; rank 0 of the default process group sends, and what
    fails on one rank raises on all.

    Args:
        trainer_model: a plain, FSDP2 or tensor-parallel module.
        target: a `vllm.LLM` or `TrainableLLM`, or the URL of a server started with
            `vllm-graft serve --weight-updates`. Ignored on ranks other than 0.
        name_mapping: checkpoint names to the model's. By default the one that the model's own
            `load_weights` gives to `load_external_weights`.
        api_key: of the server; the variable `VLLM_API_KEY` by default.

    Raises:
        WeightError: before the first byte, for values that are no numbers, or names or shapes that
            are not the engine's: it goes on with the old weights. Later, for whatever broke
            the push off: the engine refuses to serve until a whole push has gone through.
        ConnectionError: the server does not answer.
        TypeError: `target` is something else.
    """
    contents, sender = _together(lambda: _prepare(trainer_model, target, name_mapping, api_key))
    failure: Exception | None = None
    try:
        for name, tensor in contents.tensors():  # to the end, whatever fails: it is collective
            if sender is not None and failure is None:
                failure = failure_of(partial(sender.add, name, tensor))
        _together(lambda: _close(sender, failure))
    except BaseException as error:
        if sender is not None:
            sender.abandon(f"{type(error).__name__}: {error}")
        raise
    finally:
        if sender is not None:
            sender.segment.close()


def _prepare(
    model: nn.Module, target: Any, name_mapping: NameMapping | None, api_key: str | None
) -> tuple[Contents, _Sender | None]:
    """What is sent and, on rank 0, who sends it. The engine has changed nothing yet."""
    contents = Contents(model, name_mapping)
    bad = [name for name, tensor in model.named_parameters() if not is_finite(local(tensor))]
    if bad:
        raise WeightError(f"NaN or infinite values in {listed(bad)}; nothing was sent")
    if _rank() != 0:
        return contents, None
    engine = target_of(target, api_key)
    said = engine.call("describe", {})
    wanted = _read(said["weights"])
    check_same(contents.described, wanted)
    size = max([CHUNK, *(nbytes(*described) for described in wanted.values())])
    device = next(model.parameters()).device
    return contents, _Sender(engine, wanted, _segment(size, device, said), size)


def _segment(size: int, device: torch.device, said: dict[str, Any]) -> Segment | CardSegment:
    """Memory of the trainer's card where the engine's workers see it, else of the host."""
    # No process opens a card's memory of its own by a handle.
    if device.type != "cuda" or said["process"] == os.getpid():
        return Segment(size)
    if card_of(device) not in said["cards"]:
        return Segment(size)
    return CardSegment(size, device, said["ranks"])


def _read(weights: dict[str, list[Any]]) -> Described:
    return {
        name: (getattr(torch, dtype.removeprefix("torch.")), torch.Size(shape))
        for name, (dtype, shape) in weights.items()
    }


def check_same(ours: Described, wanted: Described) -> None:
    """Raise unless the engine takes just what the trainer has; dtypes may differ.

    Raises:
        WeightError: with what is missing, surplus or of another shape.
    """
    missing, surplus = wanted.keys() - ours.keys(), ours.keys() - wanted.keys()
    shapes = [
        f"{name} is {tuple(ours[name][1])}, the engine's {tuple(wanted[name][1])}"
        for name in ours.keys() & wanted.keys()
        if ours[name][1] != wanted[name][1]
    ]
    lines = [
        f"{title}: {listed(sorted(names))}"
        for title, names in (
            ("the trainer lacks", missing),
            ("the engine has no", surplus),
            ("other shapes", shapes),
        )
        if names
    ]
    if lines:
        raise WeightError(
            "trainer and engine are not the same model, nothing was sent:\n" + "\n".join(lines)
        )


class _Sender:
    """Rank 0's side of a push: fills the segment, has it loaded, begins anew."""

    def __init__(
        self, target: Target, wanted: Described, segment: Segment | CardSegment, size: int
    ) -> None:
        self._target = target
        self.segment, self._size = segment, size
        self._wanted = wanted
        self._push = uuid4().hex
        self._chunk: list[list[Any]] = []
        self._end = 0
        self._digests: dict[str, int] = {}
        self._started = False

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Send a whole tensor, in the engine's dtype."""
        dtype, shape = self._wanted[name]
        if self._end + nbytes(dtype, shape) > self._size:
            self._flush()
        place = self.segment.view(self._end, dtype, shape).copy_(tensor)
        if not is_finite(place):
            raise WeightError(f"{name} has values beyond the range of the engine's {dtype}")
        self._digests[name] = digest(place)
        self._chunk.append([name, str(dtype), list(shape), self._end])
        self._end += math.ceil(nbytes(dtype, shape) / ALIGNMENT) * ALIGNMENT

    def finish(self) -> None:
        """Have the engine serve what was sent, if it is what was sent."""
        self._flush()
        compare(self._digests, self._call("finish", digests=self._digests)["digests"])
        self._started = False

    def abandon(self, reason: str) -> None:
        """Tell the engine that nothing more comes; one that is gone need not hear it."""
        if self._started:
            failure_of(lambda: self._call("abandon", reason=reason))

    def _flush(self) -> None:
        if not self._started:
            self._call("start")
            self._started = True
        self._call("write", segment=self.segment.place(), tensors=self._chunk)
        self._chunk, self._end = [], 0

    def _call(self, step: str, **info: Any) -> dict[str, Any]:
        return self._target.call(step, {"push": self._push, **info})


def _close(sender: _Sender | None, failure: Exception | None) -> None:
    if failure is not None:
        raise failure
    if sender is not None:
        sender.finish()


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _together(step: Callable[[], T]) -> T:
    """Run a step on every rank; what fails on one raises on all.

    Raises:
        WeightError: another rank failed.
    """
    result: list[T] = []
    failure = failure_of(lambda: result.append(step()))
    if failure is not None:
        _reasons(str(failure))
        raise failure
    others = [f"rank {rank}: {reason}" for rank, reason in enumerate(_reasons(None)) if reason]
    if others:
        raise WeightError("\n".join(others))
    return result[0]


def _reasons(mine: str | None) -> Iterable[str | None]:
    """What failed on each rank."""
    if not dist.is_initialized():
        return [mine]
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, mine)
    return reasons
