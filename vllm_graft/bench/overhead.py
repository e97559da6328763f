"""What Graft's own Python costs in a decode step."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

from torch import nn

from vllm_graft.serve._vllm_engine import adapter_of, core_of


class _Clock:
    """Wall time of every call through `timed`, in seconds."""

    def __init__(self) -> None:
        self.calls: list[float] = []

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            result = function(*args, **kwargs)
            self.calls.append(time.perf_counter() - begun)
            return result

        return call


class _Timed(nn.Module):
    """A module whose calls a clock times."""

    def __init__(self, body: nn.Module, clock: _Clock) -> None:
        super().__init__()
        self.batched = getattr(body, "batched", False)
        self.forward = clock.timed(body)


def python_us(llm: Any, generate: Callable[[], Any]) -> float:
    """Median microseconds per step between what vLLM calls and what the user wrote.

    The time in the adapter's `forward` and `compute_logits`, less the time in the model's
    own. What runs inside the model counts as the model's: compiled, that is no Python of ours;
    eager, it has Graft's attention and products in it.

    Args:
        llm: a `vllm.LLM` in this process that serves a Graft model.
        generate: makes tokens of one sequence.
    """
    adapter = adapter_of(core_of(llm.llm_engine))
    body, model = adapter._body, adapter.model
    outer, inner, logits, own_logits = (_Clock() for _ in range(4))
    try:
        adapter._body = _Timed(body, inner)
        adapter.forward = outer.timed(adapter.forward)
        adapter.compute_logits = logits.timed(adapter.compute_logits)
        model.compute_logits = own_logits.timed(model.compute_logits)
        generate()
    finally:
        adapter._body = body
        del adapter.forward, adapter.compute_logits, model.compute_logits
    steps = zip(outer.calls, inner.calls, logits.calls, own_logits.calls, strict=True)
    return 1e6 * median(a - b + c - d for a, b, c, d in steps)
