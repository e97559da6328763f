"""Transformers checkpoints in hand-written models: the solved plan gives their logits."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.moe_checkpoints import to_fp8
from tests.solve.plain import STYLES, Plain
from tests.support import relative_error, spread_weights
from vllm_graft import WeightError, load_weight_plan, solve_weight_plan

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager",
}  # fmt: skip
ZOO = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "mistral": {"sliding_window": 8},
    "phi3": {},
    "granite": {
        "logits_scaling": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5,
        "embedding_multiplier": 2.0,
    },
    "olmo2": {},
    "gemma2": {
        "head_dim": 32, "sliding_window": 8, "attn_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 48, "final_logit_softcapping": 10.0,
    },
    "gemma3_text": {
        "head_dim": 32, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "cohere": {"logit_scale": 0.25},
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt2": {"n_inner": 160},
}  # fmt: skip
GROUPED = [kind for kind in ZOO if kind not in ("gpt2", "gpt_neox")]
LIMIT = 2e-5
"""Of the largest logit: the sums of two float32 models in another order."""


def original(kind):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {key: size for key, size in SIZES.items() if kind in GROUPED or "key_value" not in key}
    config = AutoConfig.for_model(kind, **(sizes | ZOO[kind]))
    return spread_weights(AutoModelForCausalLM.from_config(config)).eval()


def empty(config, style):
    model = Plain(config, STYLES[style])
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    return model


@pytest.mark.parametrize("kind", ZOO)
@pytest.mark.parametrize("style", STYLES)
@torch.no_grad()
def test_the_plan_gives_the_logits_of_transformers(kind, style, tmp_path):
    reference = original(kind)
    reference.save_pretrained(tmp_path)
    # A complex table says which rows are pairs; other tables say nothing.
    settled = None if style == "llama" else reference
    plan = solve_weight_plan(empty(reference.config, style), tmp_path, reference=settled)
    plan.save(tmp_path / "plan.json")
    model = empty(reference.config, style)
    tensors = load_file(tmp_path / "model.safetensors")
    load_weight_plan(tmp_path / "plan.json").load(model, tensors.items())
    tokens = torch.randint(96, (3, 40), generator=torch.Generator().manual_seed(5))
    assert relative_error(model(tokens), reference(tokens).logits) < LIMIT


@pytest.mark.parametrize("style", ["fast", "nano"])
def test_without_a_reference_what_is_open_is_listed(style, tmp_path):
    reference = original("llama")
    reference.save_pretrained(tmp_path)
    with pytest.raises(WeightError, match=r"leave \d possible(.|\n)*RoPE rows put into pairs"):
        solve_weight_plan(empty(reference.config, style), tmp_path)


def exchange(tensors, first, second):
    for name in [name for name in tensors if first in name]:
        other = name.replace(first, second)
        tensors[name], tensors[other] = tensors[other], tensors[name]


WRONG_NAMES = {
    "gate and up": lambda t: exchange(t, "gate_proj", "up_proj"),
    "keys and values": lambda t: exchange(t, "k_proj", "v_proj"),
    "norms": lambda t: exchange(t, "input_layernorm", "post_attention_layernorm"),
    "layers": lambda t: exchange(t, "layers.0.mlp.down", "layers.1.mlp.down"),
}


@pytest.mark.parametrize("fault", WRONG_NAMES)
@pytest.mark.parametrize("style", STYLES)
def test_exchanged_names_give_no_plan_with_a_reference(fault, style, tmp_path):
    reference = original("llama")
    reference.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    WRONG_NAMES[fault](tensors)
    config, model = reference.config.to_dict(), empty(reference.config, style)
    with pytest.raises(WeightError, match="logits of 0 of"):
        solve_weight_plan(model, tensors, config, reference)


NORMS = ("norm.weight", "ln_1.weight")
OPEN = {
    "missing": lambda t: t.popitem(),
    "surplus": lambda t: t.update({"model.layers.0.extra.weight": torch.zeros(64)}),
    "shape": lambda t: t.update({next(n for n in t if n.endswith(NORMS)): torch.zeros(7)}),
}


@pytest.mark.parametrize("fault", OPEN)
@pytest.mark.parametrize("kind", ZOO)
def test_what_does_not_fit_gives_no_plan(fault, kind, tmp_path):
    reference = original(kind)
    reference.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    OPEN[fault](tensors)
    with pytest.raises(WeightError, match="names and shapes leave open"):
        solve_weight_plan(empty(reference.config, "llama"), tensors, reference.config.to_dict())


def test_fp8_tensors_are_not_cut(tmp_path):
    reference = original("phi3")
    reference.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.qkv_proj.weight"
    tensors[name], tensors[f"{name}_scale_inv"] = to_fp8(tensors[name])
    with pytest.raises(WeightError, match="block FP8 and would have to be cut"):
        solve_weight_plan(empty(reference.config, "llama"), tensors, reference.config.to_dict())


def test_masks_and_tables_are_waived(tmp_path):
    reference = original("llama")
    reference.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    plan = solve_weight_plan(empty(reference.config, "llama"), tensors, reference.config.to_dict())
    assert [line.source for line in plan.lines if line.target is None] == [
        "model.layers.0.self_attn.rotary_emb.inv_freq"
    ]


@pytest.mark.parametrize("kind", ["llama", "phi3", "olmo2", "gpt_neox"])
def test_a_missing_head_is_not_taken_for_a_tied_one(kind, tmp_path):
    reference = original(kind)
    reference.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["embed_out.weight" if kind == "gpt_neox" else "lm_head.weight"]
    save_file(tensors, file)
    with pytest.raises(WeightError, match="parameter 'output.weight'"):
        solve_weight_plan(empty(reference.config, "llama"), tmp_path)


def test_a_line_says_what_decided_it(tmp_path):
    reference = original("llama")
    reference.save_pretrained(tmp_path)
    model = empty(reference.config, "fast")
    plan = solve_weight_plan(model, tmp_path, reference=reference)
    by = {line.source.split(".")[-2]: line.by for line in plan.lines}
    assert {part for part in by if by[part] == "logits"} == {"q_proj", "k_proj", "v_proj"}
    assert "logits of the reference" in plan.checked


def test_fused_stacks_of_experts_are_refused(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("gpt_oss", **SIZES, head_dim=32, num_local_experts=4)
    reference = AutoModelForCausalLM.from_config(config)
    reference.save_pretrained(tmp_path)
    model = empty(original("llama").config, "llama")
    with pytest.raises(WeightError, match=r"experts\.gate_up_proj'"):
        solve_weight_plan(model, tmp_path, reference=reference)
