"""Hugging Face names of Llama, Qwen2 and Qwen3 to those of Megatron's `GPTModel`.

Megatron fuses: the rows of `linear_qkv` are, query group by query group, the group's query
heads, its key head and its value head; those of `linear_fc1` are gate and then up.

Legend: N query heads, K key/value heads (query groups), H head dim.
"""

from __future__ import annotations

from typing import Any

from vllm_graft import RowOrder, Rows
from vllm_graft.examples.megatron_config import head_dim

Names = dict[str, str | RowOrder | Rows | None]


def name_mapping(hf_config: Any) -> Names:
    """The mapping for the tensors that this checkpoint has."""
    head = None if hf_config.tie_word_embeddings else "output_layer.weight"
    return {
        "model.embed_tokens.weight": "embedding.word_embeddings.weight",
        "model.layers.{}.input_layernorm.weight": "decoder.layers.{}.input_layernorm.weight",
        "model.layers.{}.post_attention_layernorm.weight": (
            "decoder.layers.{}.pre_mlp_layernorm.weight"
        ),
        "model.norm.weight": "decoder.final_layernorm.weight",
        # Tied: the same numbers as the embeddings, where a checkpoint has it at all.
        "lm_head.weight": head,
        **_attention_names(hf_config),
        **_mlp_names(hf_config.intermediate_size),
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


def _mlp_names(hidden: int) -> Names:
    theirs, ours = "model.layers.{}.mlp", "decoder.layers.{}.mlp"
    return {
        f"{theirs}.gate_proj.weight": Rows(f"{ours}.linear_fc1.weight", range(hidden)),
        f"{theirs}.up_proj.weight": Rows(f"{ours}.linear_fc1.weight", range(hidden, 2 * hidden)),
        f"{theirs}.down_proj.weight": f"{ours}.linear_fc2.weight",
    }
