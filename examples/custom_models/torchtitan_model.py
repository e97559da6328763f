"""What TorchTitan's decoders have in common behind the Custom Model API."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from vllm_graft import (
    RowOrder,
    VLLMModelForCausalLM,
    replace_with_trainable_attention,
)
from vllm_graft.examples.loading import load_checkpoint
from vllm_graft.families.torchtitan_tp import TitanParallel


class TorchTitanForCausalLM(VLLMModelForCausalLM):
    """A TorchTitan decoder behind the four methods of the Custom Model API.

    Args:
        config: of the decoder, with its sharding set.
        name_mapping: checkpoint names to the decoder's.
        use_mla: whether its attention is latent.
    """

    supports_torch_compile = True

    def __init__(
        self, config: Any, name_mapping: Mapping[str, str | RowOrder | None], *, use_mla: bool
    ) -> None:
        super().__init__()
        self.model: Any = config.build()
        self.name_mapping = name_mapping
        replace_with_trainable_attention(self.model, use_mla=use_mla)
        self.parallel = TitanParallel(self.model, None)

    def parallelize(self, parallel_context: Any) -> None:
        """Shard the decoder over vLLM's tensor-parallel ranks, by TorchTitan's own plan."""
        self.parallel = TitanParallel(self.model, parallel_context)

    def get_input_embeddings(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embed `[T]` or `[B, L]` token ids."""
        with self.parallel.running():
            embedded: torch.Tensor = self.model.tok_embeddings(input_ids)
        return embedded

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor | None = None,
        hidden_states: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Hidden states for `[T]` (one flat batch) or `[B, L]` token ids.

        `hidden_states` `[T, D]` are those of the pipeline stage before, where there is one.
        """
        flat = input_ids.dim() == 1
        tokens_BL = input_ids[None] if flat else input_ids
        positions_BL = positions[None] if flat and positions is not None else positions
        with self.parallel.running():
            if hidden_states is None:
                h_BLD = self.model.tok_embeddings(tokens_BL)
            else:
                h_BLD = hidden_states.view(*tokens_BL.shape, -1)
            for layer in self.model.layers.values():
                h_BLD = layer(h_BLD, None, positions_BL)
            h_BLD = self.model.norm(h_BLD)
        hidden: torch.Tensor = h_BLD[0] if flat else h_BLD
        return hidden

    def compute_logits(
        self, hidden_states: torch.Tensor, sampling_metadata: Any = None
    ) -> torch.Tensor:
        """Logits `[..., V]` for hidden states `[..., D]`."""
        with self.parallel.running():
            logits: torch.Tensor = self.parallel.gather(self.model.lm_head(hidden_states))
        return logits

    def load_weights(self, weights_iter: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load a Hugging Face checkpoint.

        Raises:
            WeightError: tensors left over: the config describes another model than the weights.
        """
        load_checkpoint(self.model, weights_iter, self.name_mapping)
