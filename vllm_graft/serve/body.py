"""Calling a model on vLLM's flat tokens, in the shape it was written for."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vllm_graft.positions import TokenBatch, running
from vllm_graft.serve import _vllm
from vllm_graft.serve.recording import Recording, record

logger = logging.getLogger("vllm_graft")


class TokenBody(nn.Module):
    """`(input_ids [T], positions [T]) -> hidden [T, D]`, compiled by vLLM where asked.

    A later pipeline stage gets the hidden states `[T, D]` of the one before as well.
    """

    def __init__(self, *, model: nn.Module, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        # In a tuple, so that the parameters keep one owner and one name.
        self._model = (model,)
        self.batched = False
        """Call the model with `[1, T]` instead of `[T]`; known after `find_layout`."""
        self.recording: Recording | None = None
        """What to run and compile in the model's place."""
        self._vllm_config = vllm_config

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the model with its positions in context."""
        if self.recording is not None:
            return self.recording(input_ids, positions)
        hidden = call(self._model[0], input_ids, positions, hidden_states, batched=self.batched)
        return hidden.flatten(0, 1) if hidden.dim() == 3 else hidden

    def record(self, ids: torch.dtype) -> None:
        """Run and compile a recording of the model, for token ids of this dtype, from now on.

        Raises:
            NotRecordableError: with the reason.
        """
        config = self._vllm_config
        self.recording = record(
            self._model[0],
            self.forward,
            ids,
            most=config.scheduler_config.max_num_batched_tokens,
            exact=_vllm.serves_exactly(config),
        )
        logger.debug("what is compiled:\n%s", self.recording.source)
        _vllm.extend_compile_key(config, recording=self.recording.digest)


def make_body(model: nn.Module, vllm_config: Any) -> TokenBody:
    """The body of `model`, under vLLM's `support_torch_compile` if the model allows."""
    wanted = bool(getattr(model, "supports_torch_compile", False)) or is_recorded(model)
    body_class: Any = _compiled_body() if wanted else TokenBody
    body: TokenBody = body_class(model=model, vllm_config=vllm_config)
    return body


def is_recorded(model: nn.Module) -> bool:
    """Whether the compiler gets a recording of `model`, whose Python it could not follow."""
    return bool(getattr(model, "recorded", False))


@functools.cache
def _compiled_body() -> type[nn.Module]:
    class CompiledTokenBody(TokenBody):
        pass

    return _vllm.compiled(CompiledTokenBody)


def call(
    model: nn.Module,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    hidden_states: torch.Tensor | None = None,
    *,
    batched: bool,
) -> torch.Tensor:
    """One serving forward of the user's module on `[T]` or `[1, T]` tokens."""
    received = {} if hidden_states is None else {"hidden_states": hidden_states}
    with running(TokenBatch(positions=positions, serving=True)):
        if batched:
            input_ids, positions = input_ids[None], positions[None]
            received = {name: tensor[None] for name, tensor in received.items()}
        hidden: torch.Tensor = model(input_ids, positions=positions, **received)
    return hidden


def find_layout(
    model: nn.Module,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    hidden_states: torch.Tensor | None,
    before_try: Callable[[], None],
) -> tuple[bool, torch.Tensor]:
    """Whether `model` takes `[T]` tokens, as vLLM has them, or `[1, T]`.

    Args:
        hidden_states: `[T, D]` for a later pipeline stage, else None.
        before_try: called before each of the two tries.

    Returns:
        Whether it takes `[1, T]`, and the hidden states `[T, D]` of the try.

    Raises:
        RuntimeError: it takes neither; both errors are in the text.
    """
    failures: list[tuple[str, Exception | None]] = []
    for batched, wanted in ((False, 2), (True, 3)):
        before_try()
        shape = "[1, T]" if batched else "[T]"
        try:
            hidden = call(model, input_ids, positions, hidden_states, batched=batched)
        except (ValueError, RuntimeError, IndexError, TypeError, AssertionError) as error:
            failures.append((f"  with {shape} tokens: {type(error).__name__}: {error}", error))
            continue
        leading = input_ids.shape if wanted == 2 else (1, *input_ids.shape)
        if isinstance(hidden, torch.Tensor) and hidden.shape[:-1] == leading:
            return batched, hidden.flatten(0, -2)
        got = tuple(hidden.shape) if isinstance(hidden, torch.Tensor) else type(hidden).__name__
        failures.append((f"  with {shape} tokens: forward returned {got}, not hidden states", None))
    raise RuntimeError(
        f"{type(model).__name__}.forward could not run on vLLM's flat batch of T tokens:\n"
        + "\n".join(text for text, _ in failures)
    ) from failures[-1][1]
