"""A push of weights as a worker sees it: what it takes, in which order, and what it refuses.

Steps are plain data (JSON) and errors are answers: `describe`, `start`, any number of
`write`, `finish`; `abandon` instead of the rest.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from vllm_graft.serve._vllm_engine import any_rank
from vllm_graft.serve.adapter import GraftForCausalLM
from vllm_graft.train import segment
from vllm_graft.train.digest import compare, digests_of
from vllm_graft.train.segment_cuda import opened, visible_cards
from vllm_graft.train.targets import BACKEND
from vllm_graft.weights.contents import Contents
from vllm_graft.weights.errors import WeightError, failure_of

_STEPS = ("describe", "start", "write", "finish", "abandon")
OPEN = "a push of weights has begun and is not complete"


class Receiver:
    """A worker's side of pushes, one after the other.

    Args:
        hooks: the worker's weight-update session (`_vllm_transfer.WorkerHooks`).
    """

    def __init__(self, hooks: Any) -> None:
        self._hooks = hooks
        self._push: str | None = None
        """The push that is going on."""
        self._described: dict[str, list[Any]] = {}

    def answer(self, step: str, info: dict[str, Any]) -> dict[str, Any]:
        """Take one step.

        Where vLLM 0.32 gets an exception from one worker, it leaves the answers of the
        others for the next call to read. So errors are returned.

        Returns:
            What the step says, or `error` and whether the model now `refuses` to serve.
        """
        try:
            if step not in _STEPS:
                raise ValueError(f"unknown step {step!r}; expected one of {', '.join(_STEPS)}")
            said: dict[str, Any] | None = getattr(self, step)(**info)
            return said or {}
        except Exception as error:
            text = str(error) or type(error).__name__
            return {"error": text, "refuses": self._broke_off(info.get("push"), text)}

    def describe(self) -> dict[str, Any]:
        """The tensors that a push must bring: `{name: [dtype, shape]}`, and who takes them."""
        self._described = {
            name: [str(dtype), list(shape)]
            for name, (dtype, shape) in Contents(self._adapter().model).described.items()
        }
        return {
            "weights": self._described,
            "ranks": self._hooks.ranks,
            "process": os.getpid(),
            "cards": visible_cards(),
        }

    def start(self, push: str) -> None:
        """Begin; one that did not come to its end is over."""
        adapter = self._adapter()
        if self._push is not None:
            self._abandon("another push took over")
        self._push = push
        adapter.refuse(OPEN)
        self._hooks.start()

    def write(self, push: str, segment: Any, tensors: list[list[Any]]) -> None:
        """Load `[name, dtype, shape, offset]` from a segment: of the host, or one for each rank."""
        self._check(push)
        for name, *is_, _ in tensors:
            if self._described.get(name) != is_:
                raise WeightError(f"{name!r}: {is_} came, expected {self._described.get(name)}")
        self._hooks.write(segment, tensors)

    def finish(self, push: str, digests: dict[str, int]) -> dict[str, Any]:
        """Serve the new weights if they are those that were sent."""
        self._check(push)
        adapter = self._adapter()
        with adapter.packing.keeping():
            failure = failure_of(self._hooks.finish)
            # Reading the weights back takes all ranks: none may be missing then.
            if any_rank(failure is not None):
                raise failure or WeightError("another rank could not finish the update")
            held = digests_of(Contents(adapter.model).tensors())
            compare(digests, held)
        self._push = None
        return {"digests": held}

    def abandon(self, push: str, reason: str) -> None:
        """Refuse to serve from now on, as the sender could not go on."""
        self._check(push)
        self._abandon(reason)

    def _check(self, push: str) -> None:
        if push != self._push:
            raise WeightError("another push took over, or none has begun")

    def _adapter(self) -> GraftForCausalLM:
        if not self._hooks.takes_weights:
            raise WeightError(
                "the engine was not started for weight updates: pass "
                f"weight_transfer_config={{'backend': {BACKEND!r}}} to LLM, or --weight-updates "
                "to vllm-graft serve"
            )
        model = self._hooks.model
        if not isinstance(model, GraftForCausalLM):
            raise WeightError(f"the engine serves {type(model).__name__}, not a model of Graft's")
        model.check_changeable()
        return model

    def _broke_off(self, push: Any, reason: str) -> bool:
        """End the push that failed; whether the model refuses to serve."""
        if self._push is None or push != self._push:
            return False
        self._abandon(reason)
        return True

    def _abandon(self, reason: str) -> None:
        self._push = None
        self._hooks.abandon()
        self._adapter().refuse(f"a push of weights broke off: {reason}. Push again")


def tensors_in(
    place: Any, rank: int, tensors: Iterable[list[Any]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a segment, copied: vLLM keeps them until their layer is complete."""
    if isinstance(place, str):
        yield from ((name, segment.read(place, at, *as_is)) for name, as_is, at in _typed(tensors))
        return
    with opened(place[rank]) as card:
        for name, as_is, at in _typed(tensors):
            yield name, segment.lying_at(card, at, *as_is).clone()


def _typed(
    tensors: Iterable[list[Any]],
) -> Iterator[tuple[str, tuple[torch.dtype, list[int]], int]]:
    for name, dtype, shape, offset in tensors:
        yield name, (getattr(torch, dtype.removeprefix("torch.")), shape), offset
