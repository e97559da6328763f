"""The DeepSeek V3 example outside the engine: forward, config mapping, weights, refusals."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from examples.custom_models.deepseek_v3_torchtitan import (
    DeepSeekV3TorchTitanForCausalLM,
    build_deepseek_v3_torchtitan,
)
from tests.moe_checkpoints import DEEPSEEK_SIZES, YARN, deepseek_v3_checkpoint, fp8_checkpoint
from tests.support import ROOT, python, relative_error
from vllm_graft import ParallelContext, WeightError, record_routing


def config(**overrides):
    from transformers import DeepseekV3Config

    return DeepseekV3Config(**(DEEPSEEK_SIZES | overrides))


def vllm_config(hf_config, dtype=torch.float32):
    model_config = SimpleNamespace(max_model_len=256, dtype=dtype)
    return SimpleNamespace(hf_config=hf_config, model_config=model_config)


def loaded(checkpoint, hf_config, dtype=torch.float32):
    model = build_deepseek_v3_torchtitan(vllm_config(hf_config, dtype), None)
    model.load_weights(load_file(checkpoint / "model.safetensors").items())
    return model


def transformers_model(checkpoint):
    from transformers import DeepseekV3ForCausalLM

    return DeepseekV3ForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")


VARIANTS = {
    "grouped": {},
    "one_group": {"n_group": 1, "topk_group": 1, "norm_topk_prob": False},
    "direct_query": {"q_lora_rank": None},
    "yarn": {"rope_parameters": YARN},
    "yarn_without_temperature": {
        "rope_parameters": {k: v for k, v in YARN.items() if not k.startswith("mscale")}
        | {"attention_factor": 1.0}
    },
    "half_split_rope": {"rope_interleave": False},
    "half_split_direct_query": {"rope_interleave": False, "q_lora_rank": None},
    "two_shared_experts": {"n_shared_experts": 2, "routed_scaling_factor": 1.0},
    "all_dense": {"first_k_dense_replace": 3},
    "all_sparse": {"first_k_dense_replace": 0},
    "tied": {"tie_word_embeddings": True},
    "other_eps": {"rms_norm_eps": 1e-3},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_computes_what_transformers_computes(variant, tmp_path):
    checkpoint = deepseek_v3_checkpoint(tmp_path, **VARIANTS[variant])
    reference = transformers_model(checkpoint)
    model = loaded(checkpoint, reference.config)
    tokens = torch.randint(0, 512, (2, 150), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, got = reference(tokens).logits, model.compute_logits(model(tokens))
    # Full vocabulary, fp32, three layers, other kernels throughout.
    assert (got - want).abs().max() < 1e-3
    assert relative_error(got, want) < 1e-5


def test_the_checkpoint_makes_routing_and_tokens_vary(tmp_path):
    checkpoint = deepseek_v3_checkpoint(tmp_path)
    reference = transformers_model(checkpoint)
    model = loaded(checkpoint, reference.config)
    tokens = torch.arange(256)[None]
    with torch.no_grad(), record_routing(model) as routes:
        greedy = model.compute_logits(model(tokens)).argmax(-1)
    assert len(greedy.unique()) > 30
    for name, ids_TK in routes.items():
        assert ids_TK.shape == (256, 3), name
        assert len(ids_TK.sort(-1).values.unique(dim=0)) > 10, name
    assert list(routes) == [f"model.layers.{i}.moe.router" for i in (1, 2)]


def test_the_factory_casts_without_ruining_tables():
    model = build_deepseek_v3_torchtitan(vllm_config(config(), torch.bfloat16), None)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.layers["1"].attention.rope.cache.is_complex()
    assert model.model.layers["1"].moe.expert_bias_E.dtype == torch.float32


def test_names_are_those_of_torchtitan():
    from torchtitan.models.deepseek_v3.model import DeepSeekV3Model

    from examples.custom_models.deepseek_v3_config import deepseek_v3_config

    theirs: DeepSeekV3Model = deepseek_v3_config(config(), 64).build()
    ours = DeepSeekV3TorchTitanForCausalLM(vllm_config(config())).model
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_fp8_blocks_are_dequantized_while_loading(tmp_path):
    fp8, twin = fp8_checkpoint(tmp_path / "out", deepseek_v3_checkpoint(tmp_path / "source"))
    recipe = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }  # fmt: skip
    got = loaded(fp8, config(quantization_config=recipe)).state_dict()
    want = loaded(twin, config()).state_dict()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_layers_for_multi_token_prediction_are_dropped_on_purpose(tmp_path):
    from vllm_graft import load_external_weights

    checkpoint = deepseek_v3_checkpoint(tmp_path)
    tensors = load_file(checkpoint / "model.safetensors")
    extra = {name.replace("layers.2.", "layers.3."): t for name, t in tensors.items()}
    extra |= {"model.layers.3.eh_proj.weight": torch.zeros(128, 256)} | tensors
    model = build_deepseek_v3_torchtitan(vllm_config(config(num_nextn_predict_layers=1)), None)
    _, skipped = result = load_external_weights(model.model, extra.items(), model.name_mapping)
    assert skipped == 0
    assert sorted(result.report.dropped) == sorted(set(extra) - set(tensors))


@pytest.mark.parametrize(
    ("removed", "text"),
    [
        ("model.layers.2.mlp.experts.5.up_proj.weight", r"w3_EFD\[5\]"),
        ("model.layers.1.mlp.gate.e_score_correction_bias", "layers.1.moe.expert_bias_E"),
        ("model.layers.1.self_attn.kv_b_proj.weight", "layers.1.attention.wkv_b.weight"),
    ],
)
def test_a_missing_tensor_is_named(removed, text, tmp_path):
    checkpoint = deepseek_v3_checkpoint(tmp_path)
    tensors = load_file(checkpoint / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if n != removed}, tmp_path / "model.safetensors")
    with pytest.raises(WeightError, match=text):
        loaded(tmp_path, config())


WITHOUT_MSCALE = {key: value for key, value in YARN.items() if not key.startswith("mscale")}


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ({"attention_bias": True}, r"attention_bias=True \(supported: False\)"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"num_key_value_heads": 2}, r"num_key_value_heads=2 \(supported: 4"),
        ({"scoring_func": "softmax"}, r"scoring_func='softmax' \(supported: 'sigmoid'\)"),
        ({"topk_method": "greedy"}, r"topk_method='greedy' \(supported: 'noaux_tc'\)"),
        ({"rope_parameters": WITHOUT_MSCALE}, r"factor on cos and sin .*=1\.207"),
        ({"rope_parameters": YARN | {"mscale": 1.0}}, r"factor on cos and sin .*=1\.017"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            r"rope_type='linear' \(supported: 'default', 'yarn'\)",
        ),
        ({"n_group": 8}, "n_group=8, topk_group=2.* into groups of 2 or more"),
        ({"n_group": 3}, "n_routed_experts=8, n_group=3"),
        ({"topk_group": 1}, "topk_group=1, num_experts_per_tok=3"),
        (
            {"quantization_config": {"quant_method": "awq", "bits": 4}},
            r"quantization_config.quant_method='awq' \(supported: 'fp8'\)",
        ),
        (
            {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3",
                                     "weight_block_size": [64, 64]}},
            r"weight_block_size=\[64, 64\] \(supported: \[128, 128\]\)",
        ),
    ],
)  # fmt: skip
def test_fields_it_cannot_honour_are_refused_by_name(overrides, text):
    with pytest.raises(ValueError, match=text):
        DeepSeekV3TorchTitanForCausalLM(vllm_config(config(**overrides)))


def test_it_trains_from_torchtitans_own_initial_values():
    from examples.custom_models.deepseek_v3_config import deepseek_v3_config
    from vllm_graft import replace_with_trainable_attention

    model = deepseek_v3_config(config(), max_seq_len=64).build()
    model.init_states()
    replace_with_trainable_attention(model, use_mla=True)
    model.train()(torch.arange(40).view(2, 20)).logsumexp(-1).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    counts = model.layers["1"].moe.tokens_per_expert_E
    assert counts.sum() == 40 * 3


@pytest.mark.parametrize("name", ["deepseek_v3_torchtitan", "megatron_gpt", "qwen3_torchtitan"])
def test_the_file_is_a_script(name, tmp_path):
    script = ROOT / f"examples/custom_models/{name}.py"
    done = subprocess.run(
        [sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--prompt" in done.stdout, done.stderr


def test_importing_it_is_light_and_initializes_no_cuda():
    code = (
        "import sys, examples.custom_models.deepseek_v3_torchtitan, torch\n"
        "print([m for m in ('torchtitan', 'vllm') if m in sys.modules],"
        " torch.cuda.is_initialized())"
    )
    assert python(code).stdout.strip() == "[] False"


def test_heads_that_the_ranks_cannot_share_are_refused_by_name():
    context = ParallelContext(tensor_model_parallel_size=3)
    text = "layers.0.attention: num_heads=4 cannot be divided among tensor_parallel_size=3"
    with pytest.raises(ValueError, match=text):
        build_deepseek_v3_torchtitan(vllm_config(config()), context)
