"""Llama, Qwen and DeepSeek V3 through Megatron's own `GPTModel`: served by vLLM, trainable.

As a script::

    python examples/custom_models/megatron_gpt.py CHECKPOINT --prompt "Once upon a time"

In code::

    import vllm_graft
    vllm_graft.register("MegatronModel", build_megatron_model)
    llm = LLM(CHECKPOINT, hf_overrides={"architectures": ["MegatronModel"]})

A config field that Megatron's model would not honour is refused by name: of DeepSeek V3,
experts are (`first_k_dense_replace` must be the number of layers).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from vllm_graft import VLLMModelForCausalLM, replace_with_trainable_attention
from vllm_graft.examples.loading import load_checkpoint
from vllm_graft.examples.megatron_config import (
    LATENT,
    LATENT_NORM_EPS,
    refuse_unsupported,
    rope_fields,
    transformer_config,
)
from vllm_graft.examples.megatron_names import name_mapping
from vllm_graft.examples.script import run
from vllm_graft.families.megatron_mla import with_latent_seam
from vllm_graft.families.megatron_parallel import process_groups, tensor_parallel_group
from vllm_graft.families.megatron_rope import megatron_device
from vllm_graft.positions import TokenBatch, current_batch, running

ARCH = "MegatronModel"


class MegatronForCausalLM(VLLMModelForCausalLM):
    """Megatron's `GPTModel` behind the four methods of the Custom Model API."""

    supports_torch_compile = True

    def __init__(self, vllm_config: Any, parallel_context: Any = None, **kwargs: Any) -> None:
        super().__init__()
        hf_config, model_config = vllm_config.hf_config, vllm_config.model_config
        tp_size = parallel_context.get_tensor_parallel_world_size() if parallel_context else 1
        refuse_unsupported(hf_config, tp_size)
        group = tensor_parallel_group(parallel_context)
        self.model: Any = gpt_model(
            hf_config, model_config.max_model_len, model_config.dtype, group
        )
        self.name_mapping = name_mapping(hf_config, tp_size)
        replace_with_trainable_attention(self.model, use_mla=hf_config.model_type == LATENT)

    def get_input_embeddings(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embed `[T]` or `[B, L]` token ids."""
        embedded: torch.Tensor = self.model.embedding.word_embeddings(input_ids)
        return embedded

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Hidden states for `[T]` (one flat batch) or `[B, L]` token ids."""
        flat = input_ids.dim() == 1
        tokens_BL = input_ids[None] if flat else input_ids
        with _at(positions):
            # Megatron has the length in front: [L, B, D].
            h_LBD = self.model.embedding(tokens_BL, None)
            h_LBD = self.model.decoder(h_LBD, attention_mask=None)
        hidden: torch.Tensor = h_LBD[:, 0] if flat else h_LBD.transpose(0, 1)
        return hidden

    def compute_logits(
        self, hidden_states: torch.Tensor, sampling_metadata: Any = None
    ) -> torch.Tensor:
        """Logits `[..., V]` for hidden states `[..., D]`."""
        tied = self.model.share_embeddings_and_output_weights
        weight = self.model.shared_embedding_or_output_weight() if tied else None
        logits: torch.Tensor = self.model.output_layer(hidden_states, weight=weight)[0]
        return logits

    def load_weights(self, weights_iter: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load a Hugging Face checkpoint.

        Raises:
            WeightError: tensors left over: the config describes another model than the weights.
        """
        load_checkpoint(self.model, weights_iter, self.name_mapping)


def _at(positions: torch.Tensor | None) -> AbstractContextManager[Any]:
    """Megatron passes no positions on: outside the engine they go through the context."""
    batch = current_batch()
    if positions is None or (batch is not None and batch.serving):
        return nullcontext()
    borders = None if batch is None else batch.cu_seqlens
    return running(TokenBatch(positions=positions.flatten(), cu_seqlens=borders))


def build_megatron_model(vllm_config: Any, parallel_context: Any) -> nn.Module:
    """Factory for vLLM's model registry."""
    model = MegatronForCausalLM(vllm_config=vllm_config, parallel_context=parallel_context)
    return model.to(dtype=vllm_config.model_config.dtype)


def gpt_model(hf_config: Any, max_seq_len: int, dtype: torch.dtype, tp_group: Any) -> Any:
    """Megatron's `GPTModel` for a Hugging Face config, with random weights.

    Args:
        hf_config: of a checkpoint.
        max_seq_len: the longest sequence served or trained.
        dtype: of the parameters.
        tp_group: the tensor-parallel process group, None for one rank.
    """
    from megatron.core.models.gpt.gpt_model import GPTModel

    groups = process_groups(tp_group)
    config = transformer_config(hf_config, dtype, groups.tp.size())
    with megatron_device():
        model = GPTModel(
            config=config,
            transformer_layer_spec=_layer_spec(config),
            vocab_size=hf_config.vocab_size,
            max_sequence_length=max_seq_len,
            share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
            parallel_output=False,
            pg_collection=groups,
            **rope_fields(hf_config),
        )
    _initialize(model, hf_config)
    return model


def _layer_spec(config: Any) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    spec = get_gpt_layer_local_spec(
        normalization="RMSNorm",
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
    )
    return with_latent_seam(spec) if config.multi_latent_attention else spec


def _initialize(model: nn.Module, hf_config: Any) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=hf_config.initializer_range)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    if hf_config.model_type == LATENT:
        for name, module in model.named_modules():
            if name.endswith((".q_layernorm", ".kv_layernorm")):
                module.eps = LATENT_NORM_EPS  # type: ignore[assignment]


def main() -> None:
    """Serve a checkpoint in this process and print completions."""
    run(ARCH, build_megatron_model, "Serve a checkpoint through Megatron's own GPTModel.")


if __name__ == "__main__":
    main()
