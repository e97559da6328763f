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

from typing import Any

from torch import nn

from vllm_graft import RowOrder, interleave_rope_rows
from vllm_graft.examples.deepseek_v3_config import deepseek_v3_config, is_sparse
from vllm_graft.examples.script import run
from vllm_graft.examples.torchtitan_model import TorchTitanForCausalLM
from vllm_graft.examples.torchtitan_moe import feed_forward_names

ARCH = "DeepSeekV3TorchTitan"


class DeepSeekV3TorchTitanForCausalLM(TorchTitanForCausalLM):
    """TorchTitan's `DeepSeekV3Model` behind the four methods of the Custom Model API."""

    def __init__(self, vllm_config: Any, parallel_context: Any = None, **kwargs: Any) -> None:
        hf_config = vllm_config.hf_config
        config = deepseek_v3_config(hf_config, vllm_config.model_config.max_model_len)
        super().__init__(config, name_mapping(hf_config), use_mla=True)


def build_deepseek_v3_torchtitan(vllm_config: Any, parallel_context: Any) -> nn.Module:
    """Factory for vLLM's model registry: create, replace attention, shard, cast."""
    model = DeepSeekV3TorchTitanForCausalLM(
        vllm_config=vllm_config, parallel_context=parallel_context
    )
    model.parallelize(parallel_context)
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
