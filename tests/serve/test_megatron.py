"""Megatron's GPTModel in the engine: vLLM's tokens, and training's log-probs bit for bit."""

from __future__ import annotations

import pytest

import vllm_graft
from examples.custom_models.megatron_gpt import ARCH, build_megatron_model
from tests.megatron_checkpoints import deepseek_checkpoint, llama_checkpoint
from tests.serve.moe_checks import assert_equal_tokens, check_exactness, completions
from tests.serve.test_deepseek_v3 import STOCK
from tests.serve.test_exactness import count_equal
from tests.serve.test_live_update import changed, save, update
from tests.support import (
    MIXED_LENGTHS,
    engine,
    generate,
    live_module,
    prompts,
    qwen3_checkpoint,
    sampled_logprobs,
)

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    vllm_graft.register(ARCH, build_megatron_model)
    return qwen3_checkpoint(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    vllm_graft.register(ARCH, build_megatron_model)
    return llama_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory):
    vllm_graft.register(ARCH, build_megatron_model)
    return deepseek_checkpoint(tmp_path_factory.mktemp("deepseek"))


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_greedy_tokens_are_those_of_vllms_own_model(family, request):
    checkpoint = request.getfixturevalue(family)
    mine = completions(checkpoint, ARCH)
    assert len(mine) == 16
    assert_equal_tokens(mine, completions(checkpoint, None))


@pytest.mark.parametrize(
    "eager", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["eager", "compiled"]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_sampled_token_has_the_logprob_of_training(qwen3, dtype, eager):
    tokens = prompts(MIXED_LENGTHS)
    with engine(
        qwen3, ARCH, dtype=dtype, enforce_eager=eager, enable_prefix_caching=True,
        max_num_batched_tokens=192, enable_chunked_prefill=True,
    ) as llm:  # fmt: skip
        module = live_module(llm)
        sampling = {"temperature": 1.0, "max_tokens": 40}
        together = generate(llm, tokens, **sampling)
        assert count_equal(module, tokens, together) == (360, 360)
        # The same prompts again, now from the prefix cache, and each alone in its batch.
        cached = [generate(llm, [prompt], **sampling)[0] for prompt in tokens]
        assert count_equal(module, tokens, cached) == (360, 360)
        one_by_one = [
            count_equal(module, [prompt], [c]) for prompt, c in zip(tokens, together, strict=True)
        ]
        assert one_by_one == [(40, 40)] * len(tokens)


def test_latent_attention_gives_the_tokens_of_vllms_own_deepseek(deepseek):
    mine = completions(deepseek, ARCH)
    assert len(mine) == 16
    assert_equal_tokens(mine, completions(deepseek, None, **STOCK))


@pytest.mark.parametrize(
    "eager", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["eager", "compiled"]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_latent_attention_has_the_logprobs_of_training(deepseek, dtype, eager):
    check_exactness(deepseek, ARCH, dtype=dtype, enforce_eager=eager)


@pytest.mark.parametrize("one_by_one", [False, True], ids=["one call", "one tensor at a time"])
@pytest.mark.parametrize("family", ["qwen3", "deepseek"])
def test_a_live_update_of_fused_parameters_serves_the_new_weights(
    family, one_by_one, request, tmp_path
):
    checkpoint, tokens = request.getfixturevalue(family), prompts((5, 140))
    tensors = changed(checkpoint)
    with engine(save(checkpoint, tensors, tmp_path / "new"), ARCH, dtype="float32") as llm:
        want = [sampled_logprobs(c) for c in generate(llm, tokens)]
    with engine(checkpoint, ARCH, dtype="float32") as llm:
        old = [sampled_logprobs(c) for c in generate(llm, tokens)]
        update(llm, tensors, one_by_one)
        assert [sampled_logprobs(c) for c in generate(llm, tokens)] == want != old


def test_a_live_update_without_one_part_of_a_fused_parameter_is_refused(qwen3):
    tensors = changed(qwen3)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with engine(qwen3, ARCH, dtype="float32") as llm:
        with pytest.raises(
            vllm_graft.WeightError, match=r"layers.1.mlp.linear_fc1.weight\[256 rows from 256\]"
        ):
            update(llm, tensors, one_by_one=True)
        with pytest.raises(vllm_graft.WeightError, match="refuses to serve"):
            generate(llm, prompts((5,)))
