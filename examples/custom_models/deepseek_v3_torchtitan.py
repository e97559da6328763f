"""DeepSeek V3 through TorchTitan's own model: served from the latent cache, trained by autograd.

As a script::

    python examples/custom_models/deepseek_v3_torchtitan.py CHECKPOINT --prompt "Once upon a time"

In code::

    import vllm_graft
    vllm_graft.register("DeepSeekV3TorchTitan", build_deepseek_v3_torchtitan)
    llm = LLM(CHECKPOINT, hf_overrides={"architectures": ["DeepSeekV3TorchTitan"]})

Any DeepSeek V3 checkpoint in Hugging Face format works, block-wise FP8 ones too
(dequantized while loading). Multi-token-prediction layers are dropped. A config
field that TorchTitan's model cannot honour is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from vllm_graft import (
    RowOrder,
    VLLMModelForCausalLM,
    interleave_rope_rows,
    load_external_weights,
    replace_with_trainable_attention,
)
from vllm_graft.examples.deepseek_v3_config import deepseek_v3_config, is_sparse
from vllm_graft.examples.script import run
from vllm_graft.examples.torchtitan_moe import feed_forward_names

ARCH = "DeepSeekV3TorchTitan"


class DeepSeekV3TorchTitanForCausalLM(VLLMModelForCausalLM):
    """TorchTitan's `DeepSeekV3Model` behind the four methods of the Custom Model API."""

    supports_torch_compile = True

    def __init__(self, vllm_config: Any, parallel_context: Any = None, **kwargs: Any) -> None:
        super().__init__()
        hf_config = vllm_config.hf_config
        config = deepseek_v3_config(hf_config, vllm_config.model_config.max_model_len)
        self.model: Any = config.build()
        self.name_mapping = name_mapping(hf_config)
        replace_with_trainable_attention(self.model, use_mla=True)

    def get_input_embeddings(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embed `[T]` or `[B, L]` token ids."""
        embedded: torch.Tensor = self.model.tok_embeddings(input_ids)
        return embedded

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Hidden states for `[T]` (one flat batch) or `[B, L]` token ids."""
        flat = input_ids.dim() == 1
        tokens_BL = input_ids[None] if flat else input_ids
        positions_BL = positions[None] if flat and positions is not None else positions
        h_BLD = self.get_input_embeddings(tokens_BL)
        for layer in self.model.layers.values():
            h_BLD = layer(h_BLD, None, positions_BL)
        h_BLD = self.model.norm(h_BLD)
        hidden: torch.Tensor = h_BLD[0] if flat else h_BLD
        return hidden

    def compute_logits(
        self, hidden_states: torch.Tensor, sampling_metadata: Any = None
    ) -> torch.Tensor:
        """Logits `[..., V]` for hidden states `[..., D]`."""
        logits: torch.Tensor = self.model.lm_head(hidden_states)
        return logits

    def load_weights(self, weights_iter: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load a Hugging Face checkpoint."""
        load_external_weights(
            model=self.model, weights_iter=weights_iter, name_mapping=self.name_mapping
        )


def build_deepseek_v3_torchtitan(vllm_config: Any, parallel_context: Any) -> nn.Module:
    """Factory for vLLM's model registry."""
    if parallel_context is not None and parallel_context.get_tensor_parallel_world_size() > 1:
        raise ValueError(
            f"{ARCH}: tensor_parallel_size="
            f"{parallel_context.get_tensor_parallel_world_size()} is not supported yet; use 1"
        )
    model = DeepSeekV3TorchTitanForCausalLM(
        vllm_config=vllm_config, parallel_context=parallel_context
    )
    return model.to(dtype=vllm_config.model_config.dtype)


def name_mapping(hf_config: Any) -> dict[str, str | RowOrder | None]:
    """Hugging Face names to TorchTitan's for the tensors that this checkpoint has."""
    layers = hf_config.num_hidden_layers
    sparse = [is_sparse(hf_config, index) for index in range(layers)]
    predictors = getattr(hf_config, "num_nextn_predict_layers", None) or 0
    names: dict[str, str | RowOrder | None] = {
        # Multi-token prediction: layers after the last, which the model does without.
        **{f"model.layers.{layers + index}.*": None for index in range(predictors)},
        "model.embed_tokens.weight": "tok_embeddings.weight",
        "model.layers.{}.input_layernorm.weight": "layers.{}.attention_norm.weight",
        "model.layers.{}.post_attention_layernorm.weight": "layers.{}.ffn_norm.weight",
        "model.norm.weight": "norm.weight",
        "lm_head.weight": "lm_head.weight",
    }
    names |= _attention_names(hf_config)
    names |= feed_forward_names(sparse)
    if any(sparse):
        bias = "model.layers.{}.mlp.gate.e_score_correction_bias"
        names[bias] = "layers.{}.moe.expert_bias_E"
    if any(sparse) and hf_config.n_shared_experts:
        for theirs, ours in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            shared = f"model.layers.{{}}.mlp.shared_experts.{theirs}_proj.weight"
            names[shared] = f"layers.{{}}.moe.shared_experts.{ours}.weight"
    return names


def _attention_names(hf_config: Any) -> dict[str, str | RowOrder]:
    query = {"q_proj": "wq"}
    if hf_config.q_lora_rank:
        query = {"q_a_proj": "wq_a", "q_a_layernorm": "q_norm", "q_b_proj": "wq_b"}
    latent = {"kv_a_proj_with_mqa": "wkv_a", "kv_a_layernorm": "kv_norm", "kv_b_proj": "wkv_b"}
    names: dict[str, str | RowOrder] = {
        f"model.layers.{{}}.self_attn.{theirs}.weight": f"layers.{{}}.attention.{ours}.weight"
        for theirs, ours in (query | latent | {"o_proj": "wo"}).items()
    }
    if not getattr(hf_config, "rope_interleave", True):
        # The checkpoint rotates half-split rows; TorchTitan rotates adjacent ones.
        rope = hf_config.qk_rope_head_dim
        rotated = {
            list(query)[-1]: (hf_config.num_attention_heads, hf_config.qk_nope_head_dim),
            "kv_a_proj_with_mqa": (1, hf_config.kv_lora_rank),
        }
        for theirs, (heads, before) in rotated.items():
            name = f"model.layers.{{}}.self_attn.{theirs}.weight"
            order = interleave_rope_rows(heads, before, rope)
            names[name] = RowOrder(str(names[name]), order)
    return names


def main() -> None:
    """Serve a checkpoint in this process and print completions."""
    run(ARCH, build_deepseek_v3_torchtitan, "Serve DeepSeek V3 through TorchTitan's own model.")


if __name__ == "__main__":
    main()
