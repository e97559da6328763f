"""`VLLMModelForCausalLM`: what a user's model class provides. Torch only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class VLLMModelForCausalLM(nn.Module, ABC):
    """Abstract base class of a custom model.

    A subclass implements the four methods below. Graft's adapter gives vLLM
    the interface it really calls, so nothing else is needed. A subclass that
    misses a method cannot be built; the `TypeError` names it.
    """

    supports_pp: bool = False
    """Whether the model builds only `parallel_context.stage_layers(n)` of its layers,
    with an `OtherStage` in each place of another pipeline stage."""

    supports_multimodal: bool = False
    """Multimodal inputs. `True` is refused when the model is built."""

    supports_torch_compile: bool = False
    """Whether `forward` can be traced without graph breaks. With `True`, vLLM
    compiles it unless `enforce_eager=True`; with `False` it always runs eagerly."""

    @abstractmethod
    def get_input_embeddings(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embed token ids `[T]` (or `[B, L]`) to `[T, D]` (or `[B, L, D]`)."""

    @abstractmethod
    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Return hidden states `[T, D]` for token ids `[T]` at `positions` `[T]`.

        A model that only takes `[B, L]` is called with `[1, T]` and may return
        `[1, T, D]`; the adapter finds out which of the two it wants. A later
        pipeline stage also gets `hidden_states`, what the stage before returned, and
        goes on from there.
        """

    @abstractmethod
    def compute_logits(
        self, hidden_states: torch.Tensor, sampling_metadata: Any = None
    ) -> torch.Tensor:
        """Return logits `[T, V]` for hidden states `[T, D]`."""

    @abstractmethod
    def load_weights(self, weights_iter: Iterable[tuple[str, torch.Tensor]]) -> Any:
        """Copy checkpoint tensors `(name, tensor)` into the parameters.

        May return the set of parameter names it wrote, or None: parameters
        left without a value are found either way and refused by name.
        """
