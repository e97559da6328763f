"""The dry run after loading: which shape a model takes, and whether it can serve at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from vllm_graft.serve.body import TokenBody, call, find_layout
from vllm_graft.serve.kv import PagedAttention, new_forward
from vllm_graft.serve.stages import Stage

_POSITIONS = (40, 3, 17, 0, 29, 11)
"""Distinct, in no order, and beyond the number of tokens."""
_SHUFFLED = (3, 0, 5, 1, 4, 2)


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """A few tokens through one stage of a model, without a cache."""

    arch: str
    model: nn.Module
    body: TokenBody
    paged: list[PagedAttention]
    stage: Stage
    vocab_size: int
    max_model_len: int
    tp_size: int = 1
    compute_logits: Callable[[torch.Tensor], torch.Tensor]

    @torch.inference_mode()
    def run(self) -> None:
        """Learn which shape the model takes, refuse what cannot serve.

        Raises:
            RuntimeError: what is wrong, and the usual causes.
        """
        tokens, positions, received = self._sample()
        with rehearsal(self.paged):
            self.body.batched, hidden = find_layout(
                self.model, tokens, positions, received, lambda: new_forward(self.paged)
            )
            unused = [paged.name for paged in self.paged if paged.calls == 0]
            self._check_order(tokens, positions, received, hidden)
            if received is not None:
                self._check_received(tokens, positions, received, hidden)
        if unused:
            raise RuntimeError(
                f"{self.arch}: attention modules that no forward reaches: {', '.join(unused)}"
            )
        if self.stage.last:
            self._check_logits(hidden)
        else:
            self.stage.check_sent(self.arch, hidden)

    @torch.inference_mode()
    def hidden(self) -> torch.Tensor:
        """Hidden states `[T, D]` of the tokens that `run` took, after it."""
        with rehearsal(self.paged):
            return self._again(*self._sample())

    def _sample(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        device = next(self.model.parameters()).device
        positions = torch.tensor(_POSITIONS, device=device) % self.max_model_len
        tokens = torch.arange(len(positions), device=device) * 7 % self.vocab_size
        return tokens, positions, self.stage.sample(len(positions), device)

    def _again(
        self, tokens: torch.Tensor, positions: torch.Tensor, received: torch.Tensor | None
    ) -> torch.Tensor:
        new_forward(self.paged)
        hidden = call(self.model, tokens, positions, received, batched=self.body.batched)
        return hidden.flatten(0, -2)

    def _check_order(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        received: torch.Tensor | None,
        hidden: torch.Tensor,
    ) -> None:
        """Refuse a model in which a token's result depends on its neighbours in the batch.

        Attention gives every token a result of its own in the dry run, so the
        same tokens in another order must give the same hidden states.
        """
        order = torch.tensor(_SHUFFLED, device=tokens.device)
        shuffled = None if received is None else received[order]
        got = self._again(tokens[order], positions[order], shuffled).float()
        want = hidden[order].float()
        difference = float((got - want).abs().max() / want.abs().max())
        limit = 1e-3 if hidden.dtype == torch.float32 else 5e-2
        if difference > limit:
            raise RuntimeError(
                f"{self.arch}: outside CoreAttention, the result for a token depends on the other "
                f"tokens of vLLM's flat batch (by {difference:.2g} of the largest value when the "
                "batch is reordered). Requests would mix. Usual causes: attention that was not "
                "swapped, positions counted from the input instead of taken from `positions`, a "
                "convolution or token shift"
            )

    def _check_received(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        received: torch.Tensor,
        hidden: torch.Tensor,
    ) -> None:
        """Refuse a later stage that starts from the tokens again."""
        if torch.equal(self._again(tokens, positions, received.flip(-1)), hidden):
            raise RuntimeError(
                f"{self.arch}: stage {self.stage.index} of {self.stage.count} ignores the hidden "
                "states of the stage before. forward gets them as `hidden_states` and must go on "
                "from there, in place of embedding the tokens"
            )

    def _check_logits(self, hidden: torch.Tensor) -> None:
        try:
            logits = self.compute_logits(hidden[:1])
        except RuntimeError as error:
            raise RuntimeError(
                f"{self.arch}: compute_logits failed on hidden states {tuple(hidden.shape)} from "
                f"forward (which must return hidden states, not logits): {error}"
            ) from error
        if logits.shape[0] != 1 or logits.shape[-1] < self.vocab_size:
            raise RuntimeError(
                f"{self.arch}: compute_logits returned {tuple(logits.shape)} for 1 token; "
                f"expected (1, {self.vocab_size}), vocab_size of the checkpoint's config"
                f"{self._gather_hint(logits.shape[-1])}"
            )

    def _gather_hint(self, columns: int) -> str:
        """What to say about too few columns where several ranks have some each."""
        if self.tp_size == 1 or columns * self.tp_size < self.vocab_size:
            return ""
        return (
            f". With tensor_parallel_size={self.tp_size} these are the columns of one rank, and "
            "every rank must return whole logits: gather the output of the head "
            "(ColwiseParallel(output_layouts=Replicate()) in a DTensor plan, TitanParallel.gather "
            "for TorchTitan, parallel_output=False for Megatron's GPTModel)"
        )


@contextmanager
def rehearsal(layers: list[PagedAttention]) -> Iterator[None]:
    """Run attention without a cache in the block, see `PagedAttention.rehearsing`."""
    for layer in layers:
        layer.rehearsing = True
    try:
        yield
    finally:
        for layer in layers:
            layer.rehearsing = False
