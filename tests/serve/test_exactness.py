"""The engine's log-probs equal the training forward's, bit for bit, for every token."""

from __future__ import annotations

import pytest
import torch

import vllm_graft
from examples.custom_models.qwen3_torchtitan import ARCH, build_qwen3_torchtitan
from tests.support import (
    MIXED_LENGTHS,
    engine,
    generate,
    live_module,
    prompts,
    qwen3_checkpoint,
    sampled_logprobs,
    training_logprobs,
)

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    vllm_graft.register(ARCH, build_qwen3_torchtitan)
    return qwen3_checkpoint(tmp_path_factory.mktemp("qwen3"))


def count_equal(module, tokens, completions) -> tuple[int, int]:
    """Sampled tokens whose two log-probs are equal, and all of them."""
    trained = training_logprobs(module, tokens, [list(c.token_ids) for c in completions])
    pairs = [
        (got, want)
        for completion, sample in zip(completions, trained, strict=True)
        for got, want in zip(sampled_logprobs(completion), sample.tolist(), strict=True)
    ]
    return sum(got == want for got, want in pairs), len(pairs)


def assert_equal_every_way(llm, tokens, new) -> None:
    """`new` tokens a prompt: in one batch, each alone in its batch, and trained one by one."""
    module, sampling = live_module(llm), {"temperature": 1.0, "max_tokens": new}
    every = (new * len(tokens), new * len(tokens))
    together = generate(llm, tokens, **sampling)
    assert count_equal(module, tokens, together) == every
    # The same prompts again: from the prefix cache, where there is one.
    alone = [generate(llm, [prompt], **sampling)[0] for prompt in tokens]
    assert count_equal(module, tokens, alone) == every
    one_by_one = [
        count_equal(module, [prompt], [c]) for prompt, c in zip(tokens, together, strict=True)
    ]
    assert one_by_one == [(new, new)] * len(tokens)


@pytest.mark.parametrize(
    "eager", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["eager", "compiled"]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_sampled_token_is_equal(checkpoint, dtype, eager):
    tokens = prompts(MIXED_LENGTHS)
    with engine(
        checkpoint, ARCH, dtype=dtype, enforce_eager=eager, enable_prefix_caching=True,
        max_num_batched_tokens=192, enable_chunked_prefill=True,
    ) as llm:  # fmt: skip
        assert_equal_every_way(llm, tokens, new=40)


WIDE = {
    "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 2,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip
"""Long sums, for which kernels change their order of additions with the number of rows."""


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_layers_as_wide_as_those_of_real_models(dtype, tmp_path):
    vllm_graft.register(ARCH, build_qwen3_torchtitan)
    wide = qwen3_checkpoint(tmp_path, **WIDE)
    tokens = prompts(MIXED_LENGTHS)
    with engine(wide, ARCH, dtype=dtype) as llm:
        assert_equal_every_way(llm, tokens, new=12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_contexts_longer_than_the_kernels_tile_of_keys(dtype, tmp_path):
    """Of 200 to 1,000 keys with such heads; how long it is depends on the cache and the batch."""
    vllm_graft.register(ARCH, build_qwen3_torchtitan)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128}
    long = qwen3_checkpoint(tmp_path, max_position_embeddings=2048, **heads)
    tokens = prompts((1500, 40, 700))
    with engine(
        long, ARCH, dtype=dtype, max_model_len=1600, max_num_batched_tokens=900,
        enable_chunked_prefill=True,
    ) as llm:  # fmt: skip
        assert_equal_every_way(llm, tokens, new=8)


def test_training_the_live_module_reaches_the_next_generation(checkpoint):
    tokens = prompts((5, 140))
    with engine(checkpoint, ARCH, dtype="float32") as llm:
        module = live_module(llm)
        first = generate(llm, tokens)
        module.train()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
        before = training_logprobs(module, tokens, [list(c.token_ids) for c in first])
        torch.cat(before).sum().backward()
        missing = [name for name, p in module.named_parameters() if p.grad is None]
        assert not missing
        optimizer.step()
        llm.reset_prefix_cache()
        second = generate(llm, tokens)
        assert [sampled_logprobs(c) for c in second] != [sampled_logprobs(c) for c in first]
        assert count_equal(module, tokens, second) == (128, 128)
        assert all(m.training for m in module.modules())


def test_graft_makes_the_setting_that_the_cpu_kernel_needs(checkpoint):
    from vllm import envs

    assert envs.VLLM_CPU_ATTN_SPLIT_KV is False
