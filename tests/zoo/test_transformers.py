"""Transformers models as they are: served, trained, and equal to their own forward."""

from __future__ import annotations

import copy

import pytest
import torch

import vllm_graft
from tests.serve.test_trainable_llm import trainable
from tests.support import (
    engine,
    generate,
    live_module,
    prompts,
    relative_error,
    sampled_logprobs,
    spread_weights,
    training_logprobs,
)
from vllm_graft.weights.contents import Contents
from vllm_graft.weights.save import save_checkpoint

ARCH = "AnyTransformers"
SIZES = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {"vocab_size": 512, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
ZOO = {
    "llama": SIZES,
    "gpt2": GPT2,
    "granite": SIZES | {"logits_scaling": 3.0, "attention_multiplier": 0.3},
    "qwen2": SIZES,
    "qwen3": SIZES | {"head_dim": 32},
    "mistral": SIZES | {"sliding_window": 24},
    "phi3": SIZES,
    "olmo2": SIZES,
    "cohere": SIZES | {"logit_scale": 0.25},
    "gemma2": SIZES
    | {
        "head_dim": 32,
        "sliding_window": 24,
        "attn_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 48,
        "final_logit_softcapping": 10.0,
    },
    "gemma3_text": SIZES
    | {
        "head_dim": 32,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt_oss": SIZES
    | {"head_dim": 32, "sliding_window": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_neox": SIZES | {"rotary_pct": 0.5},
    # These do not ask the attention interface; their attention is found as in a hand-written model.
    "bloom": {"vocab_size": 512, "hidden_size": 128, "n_layer": 2, "n_head": 4},
    "mpt": {"vocab_size": 512, "d_model": 128, "n_layers": 2, "n_heads": 4, "max_seq_len": 512},
    "falcon": SIZES | {"multi_query": True},
    "gptj": GPT2 | {"rotary_dim": 16},
    "stablelm": SIZES,
    "qwen3_moe": SIZES
    | {
        "head_dim": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    },
    "deepseek_v3": SIZES
    | {
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        # Stock vLLM reads these two; Transformers knows only them.
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 1,
    },
}
FAST = ("llama", "gpt2", "gemma2", "gpt_oss", "mpt")


def original(kind: str):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **ZOO[kind])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return spread_weights(model).eval()


@pytest.mark.engine
@pytest.mark.parametrize(
    "kind", [k if k in FAST else pytest.param(k, marks=pytest.mark.slow) for k in ZOO]
)
def test_served_and_trained_as_the_original(kind, tmp_path, monkeypatch):
    if kind == "deepseek_v3":  # keys and values are expanded here; vLLM would plan a latent cache
        monkeypatch.setenv("VLLM_MLA_DISABLE", "1")
    model = original(kind)
    model.save_pretrained(tmp_path)
    vllm_graft.register(ARCH, "transformers:AutoModelForCausalLM.from_config")
    tokens = prompts((5, 40, 130))
    with engine(tmp_path, ARCH, dtype="float32") as llm:
        completions = generate(llm, tokens, max_tokens=8)
        module = live_module(llm)
        samples = [p + list(c.token_ids) for p, c in zip(tokens, completions, strict=True)]
        for prompt, sample, completion in zip(tokens, samples, completions, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([sample])).logits[0, len(prompt) - 1 : -1]
            assert logits.argmax(-1).tolist() == list(completion.token_ids)
            want = logits.log_softmax(-1).max(-1).values
            assert torch.tensor(sampled_logprobs(completion)).sub(want).abs().max() < 1e-4
        assert _gap(module, tokens, completions) == 0
        _check_gradients(model, module, samples)


@pytest.mark.engine
def test_experts_are_exact_on_every_path_in_bf16(tmp_path):
    original("qwen3_moe").save_pretrained(tmp_path)
    factory = "transformers:AutoModelForCausalLM.from_config"
    with trainable(tmp_path, factory, dtype="bfloat16") as llm:
        report = vllm_graft.verify_exactness(llm, prompts((5, 140)), max_tokens=4, show=False)
        assert report.exact, report


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_experts_leave_under_the_names_of_the_checkpoint(kind, tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    original(kind).save_pretrained(tmp_path / "from")
    want = load_file(tmp_path / "from" / "model.safetensors")
    config = AutoConfig.for_model(kind, **ZOO[kind])
    port = vllm_graft.adapt(AutoModelForCausalLM.from_config(config))
    port.load_weights(iter(want.items()))
    described = Contents(port).described
    assert described == {name: (want[name].dtype, want[name].shape) for name in described}
    save_checkpoint(port, tmp_path / "from", tmp_path / "to")
    got = load_file(tmp_path / "to" / "model.safetensors")
    assert got.keys() == want.keys() == described.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "to", output_loading_info=True)
    assert not any(info.values()), info


def _gap(module, tokens, completions):
    """Largest difference of the engine's log-probabilities from the training forward's."""
    trained = training_logprobs(module, tokens, [list(c.token_ids) for c in completions])
    served = [torch.tensor(sampled_logprobs(c)) for c in completions]
    return max(float((a - b).abs().max()) for a, b in zip(served, trained, strict=True))


def _check_gradients(model, module, samples):
    """Gradients of the sum of both models' log-probabilities of their own tokens."""
    borders = torch.tensor([0, *(len(s) for s in samples)]).cumsum(0)
    flat = torch.tensor([t for s in samples for t in s])
    with vllm_graft.packed(borders):
        logits = module.compute_logits(module(flat))
    logits.log_softmax(-1).gather(1, flat[:, None]).mean().backward()
    rows = torch.cat([model(torch.tensor([s])).logits[0] for s in samples])
    rows.log_softmax(-1).gather(1, flat[:, None]).mean().backward()
    own = dict(module.model.named_parameters())
    assert own.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        if parameter.grad is None or parameter.grad.abs().max() < 1e-7:  # a key bias: rounding
            continue
        assert relative_error(own[name].grad, parameter.grad) < 1e-5, name


def test_a_latent_cache_is_refused_with_the_switch():
    from types import SimpleNamespace

    from vllm_graft.serve._vllm import refuse_latent_cache

    with pytest.raises(ValueError, match="VLLM_MLA_DISABLE=1"):
        refuse_latent_cache(SimpleNamespace(model_config=SimpleNamespace(use_mla=True)))


@pytest.mark.parametrize("kind", ["bloom", "mpt"])
def test_alibi_is_found(kind):
    adapted = vllm_graft.adapt(original(kind))
    adapted.prove(300)
    slopes = [2.0 ** -(2 * head) for head in (1, 2, 3, 4)]  # of 4 heads, in the paper
    assert [core.spec.alibi_slopes for core in adapted.cores] == [pytest.approx(slopes)] * 2


LEAKY = {
    "lfm2": SIZES | {"layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": SIZES | {"num_hidden_layers": 3, "head_dim": 32, "lru_width": 128},
}


@pytest.mark.parametrize("kind", LEAKY)
def test_state_outside_attention_is_refused(kind):
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **LEAKY[kind]))
    with pytest.raises(ValueError, match="packed into one row give other logits than alone"):
        vllm_graft.adapt(spread_weights(model).eval())


def test_names_stay():
    model = original("llama")
    before = list(copy.deepcopy(model).state_dict())
    assert list(vllm_graft.adapt(model).model.state_dict()) == before


def test_adapt_calls_a_factory_and_returns_what_is_adapted():
    model = vllm_graft.adapt(original, "llama")
    assert [site.name for site in model.sites] == [f"model.layers.{i}.self_attn" for i in (0, 1)]
    assert vllm_graft.adapt(model) is model


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (3, "takes a module or a factory, got int"),
        (dict, "the factory returned dict, not an nn.Module"),
    ],
)
def test_what_cannot_be_adapted_is_refused(wrong, message):
    with pytest.raises(TypeError, match=message):
        vllm_graft.adapt(wrong)
