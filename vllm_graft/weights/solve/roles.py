"""What a tensor is, from its name: the words of Transformers, TorchTitan, Megatron and others."""

from __future__ import annotations

import re

from vllm_graft.weights.solve.groups import Group

_ATTENTION = r"(?:.*\.)?(?:\w*attn\w*|\w*attention\w*)\."
_MLP = r"(?:.*\.)?(?:mlp|ffn|ff|feed_forward|feedforward|block_sparse_moe|moe|\w*experts?)\."
_ROLES = {
    "embed": (
        r"(?:.*\.)?(?:embed_tokens|tok_embeddings|wte|embed_in|word_embeddings|tok_emb"
        r"|token_embeddings?|embed|embedding|embeddings)"
    ),
    "positions": r"(?:.*\.)?(?:wpe|position_embeddings?|pos_embed\w*|pos_emb)",
    "head": r"(?:\w+\.)*(?:lm_head|output|output_layer|embed_out|head|unembed)",
    "final_norm": (
        r"(?:\w+\.)*"
        r"(?:norm|ln_f|norm_f|final_norm|final_layer_?norm|ln_final)"
    ),
    "norm.attn_in": (
        r".*\{\}\.(?:input_layernorm|attention_norm|attn_norm|ln_1|ln1|pre_attention_\w*norm)"
    ),
    "norm.mlp_in": (
        r".*\{\}\.(?:ffn_norm|mlp_norm|ln_2|ln2|pre_mlp_\w*norm|pre_feedforward_\w*norm)"
    ),
    "norm.after": r".*\{\}\.post_attention_(?:layernorm|norm)",
    "norm.attn_out": r".*\{\}\.(?:post_attn_norm|attn_post_norm|attention_post_norm)",
    "norm.mlp_out": r".*\{\}\.(?:post_feedforward_\w*norm|post_ffn_norm|post_mlp_\w*norm)",
    "q_norm": _ATTENTION + r"(?:q_norm|q_layernorm|q_a_layernorm|query_norm)",
    "k_norm": _ATTENTION + r"(?:k_norm|k_layernorm|key_norm)",
    "kv_norm": _ATTENTION + r"(?:kv_norm|kv_a_layernorm|kv_layernorm)",
    "q": _ATTENTION + r"(?:\w+\.)?(?:q_proj|wq|linear_q_proj|to_q|query|q)",
    "k": _ATTENTION + r"(?:\w+\.)?(?:k_proj|wk|to_k|key|k)",
    "v": _ATTENTION + r"(?:\w+\.)?(?:v_proj|wv|to_v|value|v)",
    "qkv": _ATTENTION + r"(?:\w+\.)?(?:qkv_proj|qkv|wqkv|c_attn|query_key_value|linear_qkv)",
    "o": _ATTENTION + r"(?:o_proj|wo|out_proj|c_proj|dense|linear_proj|proj|to_out)",
    "q_a": _ATTENTION + r"(?:q_a_proj|wq_a|linear_q_down_proj)",
    "q_b": _ATTENTION + r"(?:q_b_proj|wq_b|linear_q_up_proj)",
    "kv_a": _ATTENTION + r"(?:kv_a_proj_with_mqa|wkv_a|linear_kv_down_proj)",
    "kv_b": _ATTENTION + r"(?:kv_b_proj|wkv_b|linear_kv_up_proj)",
    "sinks": _ATTENTION + r"sinks?",
    "router": r".*\.(?:router\.gate|router|moe\.gate|block_sparse_moe\.gate)",
    "router_bias": r".*\.(?:gate\.e_score_correction_bias|expert_bias(?:_E)?)",
    "gate": _MLP + r"(?:.*\.)?(?:gate_proj|w1|w1_EFD|w_gate|gate)",
    "up": (
        _MLP + r"(?:.*\.)?(?:up_proj|w3|w3_EFD|w_up|up|c_fc|fc1|dense_h_to_4h|fc_in)"
    ),
    "gate_up": _MLP + r"(?:.*\.)?(?:gate_up_proj|linear_fc1|gate_up|w13)",
    "down": (
        _MLP
        + r"(?:.*\.)?(?:down_proj|w2|w2_EDF|w_down|down|c_proj|fc2|linear_fc2|dense_4h_to_h|fc_out)"
    ),
}  # fmt: skip
_PATTERNS = {role: re.compile(text) for role, text in _ROLES.items()}


def roles_of(groups: list[Group]) -> dict[tuple[str, str], Group]:
    """Groups by role and kind (weight or bias); what no word, or two groups claim, is left out."""
    found: dict[tuple[str, str], list[Group]] = {}
    patterns = [group.pattern for group in groups]
    for group in groups:
        role = _role(group.pattern, patterns)
        if role is not None:
            found.setdefault(role, []).append(group)
    return {role: claims[0] for role, claims in found.items() if len(claims) == 1}


def _role(pattern: str, patterns: list[str]) -> tuple[str, str] | None:
    path, _, kind = pattern.rpartition(".")
    if kind not in ("weight", "bias"):
        # A bare parameter: an expert stack, sinks, a bias beside its stack.
        path = pattern.removesuffix("_bias") if "e_score" not in pattern else pattern
        kind = "weight" if path == pattern else "bias"
        if "expert_bias" in pattern:
            path, kind = pattern, "weight"
    role = next((r for r, regex in _PATTERNS.items() if regex.fullmatch(path)), None)
    if role == "gate" and path.endswith("mlp.gate") and any("experts" in p for p in patterns):
        role = "router"
    if role == "norm.after":
        role = _after_attention(path, patterns)
    if role in ("gate", "up", "gate_up", "down"):
        prefix = re.search(r"shared_experts?|experts", path)
        if prefix:
            role = ("shared." if "shared" in prefix[0] else "expert.") + role
    return None if role is None else (role, kind)


def _after_attention(path: str, patterns: list[str]) -> str:
    """`post_attention_layernorm`: before the MLP, unless other norms have that place."""
    sandwich = any("post_feedforward" in p or "post_ffn" in p or "post_mlp" in p for p in patterns)
    return "norm.attn_out" if sandwich else "norm.mlp_in"
