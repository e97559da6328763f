"""Where the tokens of the running batch stand: positions and sample borders.

A model written for `model(input_ids)` has no argument for positions, yet RoPE
needs them: vLLM's flat batch mixes requests, and a packed training batch mixes
samples. The caller puts a `TokenBatch` in the context and attention reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """One flat batch of T tokens."""

    positions: torch.Tensor
    """`[T]` int64, each token's index in its own sequence; on any device."""

    cu_seqlens: torch.Tensor | None = None
    """`[B + 1]` int32 borders of the packed samples; None while serving."""

    serving: bool = False
    """Whether vLLM's engine runs this batch (the paged cache holds the context)."""

    serial: int = 0
    """A number of its own for every `packed(...)` block."""


class _Holder:
    # A plain attribute, not a ContextVar: torch.compile traces reads and writes of it.
    batch: TokenBatch | None = None


_HOLDER = _Holder()
_SERIALS = count(1)


def current_batch() -> TokenBatch | None:
    """The batch that is running, or None outside `packed` and outside the engine."""
    return _HOLDER.batch


def batch_for(module: nn.Module) -> TokenBatch | None:
    """The batch that `module` runs in.

    Raises:
        RuntimeError: activation checkpointing recomputes it outside the
            `packed(...)` block of its forward: the borders are gone, and
            samples would leak into each other's gradients.
    """
    batch = _HOLDER.batch
    if torch.compiler.is_compiling() or (batch is not None and batch.serving):
        return batch
    serial, ran = 0 if batch is None else batch.serial, _forwards_of(module)
    if torch._C._current_graph_task_id() == -1:
        ran.note(serial)
    elif ran.blocks - {serial}:
        raise RuntimeError(
            "attention is recomputed in backward (activation checkpointing) outside the "
            "packed(...) block of its forward, or ran in several such blocks before one backward; "
            "call backward() inside the block"
        )
    else:
        ran.settled = True
    return batch


@dataclass
class _Forwards:
    """In which `packed(...)` blocks (0: in none) a module ran, as far as backward may redo it."""

    blocks: set[int] = field(default_factory=set)
    settled: bool = True
    """Whether the next forward takes their place: they were recomputed, or need not be."""

    def note(self, block: int) -> None:
        """A forward, which a checkpoint will redo if it runs under hooks on saved tensors."""
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        if self.settled or hooks is None:
            self.blocks.clear()
        self.settled = hooks is None
        self.blocks.add(block)


def _forwards_of(module: nn.Module) -> _Forwards:
    forwards: _Forwards = module.__dict__.setdefault("_forwards", _Forwards())
    return forwards


@contextmanager
def running(batch: TokenBatch) -> Iterator[None]:
    """Make `batch` the current one for the block."""
    before = _HOLDER.batch
    _HOLDER.batch = batch
    try:
        yield
    finally:
        _HOLDER.batch = before


def check_cu_seqlens(cu_seqlens: torch.Tensor | Sequence[int], num_tokens: int) -> torch.Tensor:
    """Return the borders as `[B + 1]` int32 on CPU, or say which rule they break.

    Raises:
        ValueError: not one-dimensional, not rising from 0, or not ending at `num_tokens`.
    """
    borders = torch.as_tensor(cu_seqlens, dtype=torch.int32, device="cpu")
    valid = (
        borders.dim() == 1
        and borders.numel() >= 2
        and int(borders[0]) == 0
        and int(borders[-1]) == num_tokens
        and bool((borders[1:] >= borders[:-1]).all())
    )
    if not valid:
        raise ValueError(
            f"cu_seqlens must rise from 0 to the number of tokens ({num_tokens}), "
            f"got {borders.tolist()}"
        )
    return borders


def positions_of(cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Positions `[T]` int64 that restart at 0 in every packed sample."""
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    starts = torch.repeat_interleave(cu_seqlens[:-1].long(), lengths)
    return torch.arange(len(starts), device=starts.device) - starts


@contextmanager
def packed(cu_seqlens: torch.Tensor | Sequence[int]) -> Iterator[TokenBatch]:
    """Run a model on samples packed into one flat batch.

    Inside the block every Graft attention keeps the samples apart, and RoPE
    positions restart in each, for models that have no argument for either::

        with packed([0, 5, 12]):
            hidden = model(input_ids)          # [12] or [1, 12] tokens

    Args:
        cu_seqlens: `[B + 1]` borders, rising from 0 to the number of tokens T.

    Raises:
        ValueError: the borders do not rise from 0.
    """
    num_tokens = int(cu_seqlens[-1]) if len(cu_seqlens) else 0
    borders = check_cu_seqlens(cu_seqlens, num_tokens)
    batch = TokenBatch(positions=positions_of(borders), cu_seqlens=borders, serial=next(_SERIALS))
    with running(batch):
        yield batch


def resume_in_backward(hidden: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
    """`hidden`, whose backward runs in `batch` again, however late it comes.

    Activation checkpointing recomputes the layers below in backward, and must
    find the borders and positions of their forward.
    """
    resumed: torch.Tensor = _Resume.apply(hidden, batch)  # type: ignore[no-untyped-call]
    return resumed


class _Resume(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
        ctx.batch = batch
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        before, _HOLDER.batch = _HOLDER.batch, ctx.batch

        def restore() -> None:
            _HOLDER.batch = before

        torch.autograd.Variable._execution_engine.queue_callback(restore)
        return grad, None


def store_positions_in_context(positions: torch.Tensor | None) -> None:
    """Set the positions that attention uses for RoPE in this forward.

    Graft's adapter has already stored vLLM's positions when a model's
    `forward` runs, so this call is needed only to override them. Outside
    vLLM, or with None, it does nothing.

    Raises:
        ValueError: `positions` is not one number per token of the batch.
    """
    batch = _HOLDER.batch
    if positions is None or batch is None or not batch.serving:
        return
    if positions.numel() != batch.positions.numel():
        raise ValueError(
            f"store_positions_in_context: expected {batch.positions.numel()} positions, "
            f"one per token of the batch, got shape {tuple(positions.shape)}"
        )
    _HOLDER.batch = TokenBatch(
        positions=positions.flatten(), cu_seqlens=batch.cu_seqlens, serving=True
    )
