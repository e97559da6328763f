"""Hugging Face names of Llama, Qwen2, Qwen3 and DeepSeek V3 to those of Megatron's `GPTModel`.

Megatron fuses: the rows of `linear_qkv` are, query group by query group, the group's query
heads, its key head and its value head; those of `linear_fc1` are gate and then up, on each
tensor-parallel rank.

Legend: N query heads, K key/value heads (query groups), H head dim.
"""

from __future__ import annotations

from typing import Any

from vllm_graft import RowOrder, Rows, interleave_rope_rows
from vllm_graft.examples.megatron_config import LATENT, head_dim

Names = dict[str, str | RowOrder | Rows | None]


def name_mapping(hf_config: Any, tp_size: int = 1) -> Names:
    """The mapping for the tensors that this checkpoint has, on `tp_size` ranks."""
    latent = hf_config.model_type == LATENT
    predictors = getattr(hf_config, "num_nextn_predict_layers", None) or 0
    head = None if hf_config.tie_word_embeddings else "output_layer.weight"
    layers = hf_config.num_hidden_layers
    return {
        # Multi-token prediction: layers after the last, which the model does without.
        **{f"model.layers.{layers + index}.*": None for index in range(predictors)},
        "model.embed_tokens.weight": "embedding.word_embeddings.weight",
        "model.layers.{}.input_layernorm.weight": "decoder.layers.{}.input_layernorm.weight",
        "model.layers.{}.post_attention_layernorm.weight": (
            "decoder.layers.{}.pre_mlp_layernorm.weight"
        ),
        "model.norm.weight": "decoder.final_layernorm.weight",
        # Tied: the same numbers as the embeddings, where a checkpoint has it at all.
        "lm_head.weight": head,
        **(_latent_names(hf_config) if latent else _attention_names(hf_config)),
        **_mlp_names(hf_config.intermediate_size, tp_size),
    }


def _attention_names(hf_config: Any) -> Names:
    theirs, ours = "model.layers.{}.self_attn", "decoder.layers.{}.self_attention"
    names: Names = {f"{theirs}.o_proj.weight": f"{ours}.linear_proj.weight"}
    groups = hf_config.num_key_value_heads
    rows = qkv_rows(hf_config.num_attention_heads, groups, head_dim(hf_config))
    kinds = ("weight", "bias") if hf_config.model_type == "qwen2" else ("weight",)
    for kind in kinds:
        for part, at in rows.items():
            names[f"{theirs}.{part}_proj.{kind}"] = Rows(f"{ours}.linear_qkv.{kind}", at)
    if hf_config.model_type == "qwen3":
        for part in "qk":
            names[f"{theirs}.{part}_norm.weight"] = f"{ours}.{part}_layernorm.weight"
    return names


def qkv_rows(heads: int, groups: int, head_dim: int) -> dict[str, list[int]]:
    """Rows of `linear_qkv` `[(N + 2K) * H, D]` that hold q, k and v.

    >>> qkv_rows(4, 2, 1)
    {'q': [0, 1, 4, 5], 'k': [2, 6], 'v': [3, 7]}
    """
    queries = heads // groups
    kinds = ["q"] * queries + ["k", "v"]
    rows: dict[str, list[int]] = {"q": [], "k": [], "v": []}
    for head, kind in enumerate(kinds * groups):
        rows[kind] += range(head * head_dim, (head + 1) * head_dim)
    return rows


def _latent_names(hf_config: Any) -> Names:
    theirs, ours = "model.layers.{}.self_attn", "decoder.layers.{}.self_attention"
    query = {"q_proj": "linear_q_proj"}
    if hf_config.q_lora_rank:
        query = {
            "q_a_proj": "linear_q_down_proj",
            "q_a_layernorm": "q_layernorm",
            "q_b_proj": "linear_q_up_proj",
        }
    parts = query | {
        "kv_a_proj_with_mqa": "linear_kv_down_proj",
        "kv_a_layernorm": "kv_layernorm",
        "kv_b_proj": "linear_kv_up_proj",
        "o_proj": "linear_proj",
    }
    names: Names = {f"{theirs}.{t}.weight": f"{ours}.{o}.weight" for t, o in parts.items()}
    if not getattr(hf_config, "rope_interleave", True):
        # The checkpoint rotates half-split rows; Megatron's latent attention adjacent ones.
        heads, rope = hf_config.num_attention_heads, hf_config.qk_rope_head_dim
        rotated = {
            list(query)[-1]: (heads, hf_config.qk_nope_head_dim),
            "kv_a_proj_with_mqa": (1, hf_config.kv_lora_rank),
        }
        for part, (count, before) in rotated.items():
            order = interleave_rope_rows(count, before, rope)
            names[f"{theirs}.{part}.weight"] = RowOrder(f"{ours}.{parts[part]}.weight", order)
    return names


def _mlp_names(hidden: int, tp_size: int) -> Names:
    theirs, ours = "model.layers.{}.mlp", "decoder.layers.{}.mlp"
    gate, up = gate_up_rows(hidden, tp_size)
    return {
        f"{theirs}.gate_proj.weight": Rows(f"{ours}.linear_fc1.weight", gate),
        f"{theirs}.up_proj.weight": Rows(f"{ours}.linear_fc1.weight", up),
        f"{theirs}.down_proj.weight": f"{ours}.linear_fc2.weight",
    }


def gate_up_rows(hidden: int, tp_size: int) -> tuple[list[int], list[int]]:
    """Rows of `linear_fc1` `[2 * hidden, D]` that hold gate and up: a share of both per rank.

    >>> gate_up_rows(4, 2)
    ([0, 1, 4, 5], [2, 3, 6, 7])
    """
    share = hidden // tp_size
    starts = range(0, 2 * hidden, 2 * share)
    gate = [row for start in starts for row in range(start, start + share)]
    return gate, [row + share for row in gate]
