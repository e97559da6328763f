"""Differentiable log-probabilities of given tokens, from one packed forward. Torch only.

Legend: T tokens in the flat batch, D model width, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from vllm_graft.positions import packed, resume_in_backward

_CHUNK_BYTES = 128 << 20
"""Memory for the float32 logits of one chunk."""


@dataclass(frozen=True)
class Row:
    """A token to score: token `step` of the completion of sample `sample`."""

    sample: int
    step: int


Process = Callable[[torch.Tensor, Sequence[Row]], torch.Tensor]
"""The model's logits `[C, V]` of C rows to those that tokens were sampled from, float32."""
Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Logits `[C, V]` and one token for each row `[C]` to float32 log-probs `[C]`, without gradient."""


def token_logprobs(
    hidden_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    sequences: Sequence[Sequence[int]],
    prompt_lens: Sequence[int],
    *,
    vocab_size: int,
    device: torch.device,
    process: Process | None = None,
    kernel: Kernel | None = None,
) -> list[torch.Tensor]:
    """Log-probabilities of the tokens after each prompt.

    Logits are made for some rows at a time, and again in backward, so memory does not
    grow with T x V.

    Args:
        hidden_of: `(tokens [T], positions [T])` to hidden states `[T, D]`.
        logits_of: hidden states `[C, D]` to logits `[C, V]`.
        sequences: B token lists, prompt and completion.
        prompt_lens: how many tokens of each are its prompt; at least 1.
        vocab_size: V.
        device: of the model.
        process: what the sampler makes of the logits; None for the model's own.
        kernel: by what the sampler computes log-probabilities; None for `log_softmax`.

    Returns:
        B float32 tensors on `device`, one number per token after the prompt.
    """
    borders = torch.tensor([0, *map(len, sequences)]).cumsum(0)
    tokens = torch.tensor([token for sequence in sequences for token in sequence], device=device)
    lengths = [len(s) - p for s, p in zip(sequences, prompt_lens, strict=True)]
    rows = [Row(sample, step) for sample, n in enumerate(lengths) for step in range(n)]
    firsts = [int(start) + p for start, p in zip(borders, prompt_lens, strict=False)]
    targets = torch.tensor([firsts[row.sample] + row.step for row in rows], dtype=torch.long)
    # The engine runs without autocast, so what must equal it does too.
    with torch.autocast(device.type, enabled=False), packed(borders) as batch:
        hidden = resume_in_backward(hidden_of(tokens, batch.positions.to(device)), batch)
        predicting = hidden[(targets - 1).to(device)]
        chosen = _chunked(
            predicting, tokens[targets.to(device)], rows, logits_of, vocab_size, process, kernel
        )
    return list(chosen.split(lengths))


def _chunked(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    rows: Sequence[Row],
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    vocab_size: int,
    process: Process | None,
    kernel: Kernel | None,
) -> torch.Tensor:
    def chosen(part: torch.Tensor, wanted: torch.Tensor, which: Sequence[Row]) -> torch.Tensor:
        logits = logits_of(part)[:, :vocab_size]
        if process is not None:
            logits = process(logits, which)
        if kernel is not None:
            by_kernel: torch.Tensor = _ByKernel.apply(logits, wanted, kernel)  # type: ignore[no-untyped-call]
            return by_kernel
        logprobs = logits.log_softmax(-1, dtype=torch.float32)
        return logprobs.gather(1, wanted[:, None])[:, 0]

    size = max(1, _CHUNK_BYTES // (4 * vocab_size))
    parts = [hidden.new_empty(0, dtype=torch.float32)]
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        parts.append(
            checkpoint(chosen, hidden[part], targets[part], rows[part], use_reentrant=False)
        )
    return torch.cat(parts)


class _ByKernel(torch.autograd.Function):
    """Log-probabilities as the sampler's kernel computes them, with the gradient of a softmax."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, tokens: torch.Tensor, kernel: Kernel
    ) -> torch.Tensor:
        ctx.save_for_backward(logits, tokens)
        return kernel(logits, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, tokens = ctx.saved_tensors
        of_logits = logits.softmax(-1, dtype=torch.float32).mul_(-grad[:, None])
        of_logits.scatter_add_(1, tokens[:, None], grad[:, None])
        return of_logits.to(logits.dtype), None, None
