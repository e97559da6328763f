"""DeepSeek V3 through TorchTitan in the engine: MLA from the latent cache, grouped experts, FP8."""

from __future__ import annotations

import pytest
import torch

import vllm_graft
from examples.custom_models.deepseek_v3_torchtitan import ARCH, build_deepseek_v3_torchtitan
from tests.moe_checkpoints import YARN, deepseek_v3_checkpoint, fp8_checkpoint
from tests.serve.moe_checks import (
    assert_equal_tokens,
    check_exactness,
    check_routing,
    completions,
)
from tests.serve.test_exactness import count_equal
from tests.support import engine, generate, live_module, prompts, sampled_logprobs

pytestmark = pytest.mark.engine

STOCK = {
    "compilation_config": {"custom_ops": ["-rotary_embedding"]},
    "attention_backend": "CPU_MLA",
}
"""For vLLM's own model: its CPU kernel for RoPE is wrong for MLA, see the test below, and what it
takes on processors with AMX refuses float32."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    vllm_graft.register(ARCH, build_deepseek_v3_torchtitan)
    return deepseek_v3_checkpoint(tmp_path_factory.mktemp("deepseek_v3"))


def test_greedy_tokens_are_those_of_vllms_own_model(checkpoint):
    mine = completions(checkpoint, ARCH)
    assert_equal_tokens(mine, completions(checkpoint, None, **STOCK))
    assert len({token for completion in mine for token in completion.token_ids}) > 100


VARIANTS = {
    "yarn": {"rope_parameters": YARN},
    "direct_query": {"q_lora_rank": None},
    "one_group": {"n_group": 1, "topk_group": 1, "norm_topk_prob": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_give_the_tokens_of_vllm_and_transformers(variant, tmp_path):
    from transformers import DeepseekV3ForCausalLM

    vllm_graft.register(ARCH, build_deepseek_v3_torchtitan)
    checkpoint = deepseek_v3_checkpoint(tmp_path, **VARIANTS[variant])
    lengths = (1, 33, 200)
    mine = completions(checkpoint, ARCH, lengths)
    assert_equal_tokens(mine, completions(checkpoint, None, lengths, **STOCK))
    reference = DeepseekV3ForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
    for prompt, completion in zip(prompts(lengths), mine, strict=True):
        sample = torch.tensor([prompt + list(completion.token_ids)])
        with torch.inference_mode():
            logprobs = reference(sample).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        assert logprobs.argmax(-1).tolist() == list(completion.token_ids)
        wanted = logprobs.max(-1).values.tolist()
        assert sampled_logprobs(completion) == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize(
    "eager", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["eager", "compiled"]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_token_has_the_logprob_of_training(checkpoint, dtype, eager):
    check_exactness(checkpoint, ARCH, dtype=dtype, enforce_eager=eager)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_engine_and_training_choose_the_same_experts(checkpoint, dtype):
    assert check_routing(checkpoint, ARCH, dtype=dtype) == 1 + 5 + 64 + 130 + 4 * 19


def test_fp8_blocks_serve_like_their_dequantized_numbers(checkpoint, tmp_path):
    """vLLM refuses fp8 with float32, so its own quantization is switched off."""
    fp8, plain = fp8_checkpoint(tmp_path, checkpoint)
    off = {"architectures": [ARCH], "quantization_config": None}
    lengths = (1, 33, 200)
    mine = completions(fp8, ARCH, lengths, hf_overrides=off)
    twin = completions(plain, ARCH, lengths)
    assert [c.token_ids for c in mine] == [c.token_ids for c in twin]
    assert [sampled_logprobs(c) for c in mine] == [sampled_logprobs(c) for c in twin]
    stock = completions(plain, None, lengths, **STOCK)
    assert_equal_tokens(mine, stock)


def test_fp8_in_bf16_needs_no_override(checkpoint, tmp_path):
    fp8, plain = fp8_checkpoint(tmp_path, checkpoint)
    results = [completions(p, ARCH, (1, 33), dtype="bfloat16") for p in (fp8, plain)]
    mine, twin = ([sampled_logprobs(c) for c in result] for result in results)
    assert mine == twin


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float32", 4)])
def test_the_cache_holds_576_numbers_per_token_and_layer(checkpoint, dtype, size):
    with engine(checkpoint, ARCH, dtype=dtype) as llm:
        cache = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
        (group,) = cache.kv_cache_groups
        tokens = cache.num_blocks * group.kv_cache_spec.block_size
        assert sum(tensor.size for tensor in cache.kv_cache_tensors) / tokens == 576 * size * 3


def test_vllms_cpu_kernel_for_rope_is_still_wrong_for_mla():
    """vLLM 0.32: heads in a dimension of their own. When this fails, drop `STOCK` and what
    `serve/_vllm_stock.py` does on CPU."""
    from vllm.config import VllmConfig, set_current_vllm_config

    torch.manual_seed(0)
    q_TNP, k_T1P, positions = torch.randn(9, 4, 64), torch.randn(9, 1, 64), torch.arange(9)
    with set_current_vllm_config(VllmConfig()):
        from vllm.model_executor.layers.rotary_embedding import get_rope

        rope = get_rope(64, 32, rope_parameters={"rope_theta": 1e4}, is_neox_style=False)
        rope = rope.float()
        want, _ = rope.forward_native(positions, q_TNP.clone(), k_T1P.clone())
        flat, _ = rope.forward_cpu(positions, q_TNP.flatten(1).clone(), k_T1P.flatten(1).clone())
        got, _ = rope.forward_cpu(positions, q_TNP.clone(), k_T1P.clone())
    assert torch.allclose(flat.view_as(want), want, atol=1e-6)
    assert not torch.allclose(got, want, atol=1e-2)


def test_a_live_update_reaches_the_latent_cache_and_the_experts(checkpoint):
    """vLLM's reload exchanges every tensor, `wkv_b` and expert stacks among them."""
    tokens = prompts((5, 40))
    with engine(checkpoint, ARCH, dtype="float32") as llm:
        module = live_module(llm)
        before = [sampled_logprobs(c) for c in generate(llm, tokens, max_tokens=8)]
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(-0.9)
        changed = generate(llm, tokens, max_tokens=8)
        assert [sampled_logprobs(c) for c in changed] != before
        assert count_equal(module, tokens, changed) == (16, 16)
        llm.collective_rpc("reload_weights")
        again = generate(llm, tokens, max_tokens=8)
        assert [sampled_logprobs(c) for c in again] == before
        assert count_equal(module, tokens, again) == (16, 16)
