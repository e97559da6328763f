"""TorchTitan's Qwen3 in the engine against vLLM's own Qwen3 on the same checkpoint."""

from __future__ import annotations

import pytest
import torch

import vllm_graft
from examples.custom_models.qwen3_torchtitan import ARCH, build_qwen3_torchtitan
from tests.support import adapter, engine, generate, prompts, qwen3_checkpoint, sampled_logprobs

pytestmark = pytest.mark.engine

SHAPES = {
    "gqa": {},
    "mqa": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "mha": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "wide_heads": {"hidden_size": 96, "num_attention_heads": 4, "head_dim": 64},
    "tied": {"tie_word_embeddings": True},
}
LENGTHS = (1, 2, 3, 7, 16, 31, 64, 100, 127, 128, 129, 160, 200, 256, 299, 300)


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_are_equal_and_logprobs_close(shape, tmp_path):
    vllm_graft.register(ARCH, build_qwen3_torchtitan)
    checkpoint = qwen3_checkpoint(tmp_path, **SHAPES[shape])
    tokens = prompts(LENGTHS)
    # One prompt twice, and one that extends another: prefix-cache hits.
    tokens += [tokens[-1], tokens[-1] + [5, 6, 7]]
    results = {}
    for arch in (ARCH, None):
        with engine(checkpoint, arch, dtype="float32", enable_prefix_caching=True) as llm:
            results[arch] = generate(llm, tokens[:1]) + generate(llm, tokens)
    for mine, stock in zip(results[ARCH], results[None], strict=True):
        assert list(mine.token_ids) == list(stock.token_ids)
        assert len(mine.token_ids) == 64
        # fp32, three layers, different summation orders in the two implementations.
        assert sampled_logprobs(mine) == pytest.approx(sampled_logprobs(stock), abs=1e-4)


def test_sliding_windows_give_the_tokens_of_transformers(tmp_path):
    """vLLM's own Qwen3 refuses windows on some layers only, so Transformers is the reference."""
    from transformers import Qwen3ForCausalLM

    vllm_graft.register(ARCH, build_qwen3_torchtitan)
    window = {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1}
    checkpoint = qwen3_checkpoint(tmp_path, **window)
    reference = Qwen3ForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
    tokens = prompts((30, 100, 200))
    with engine(checkpoint, ARCH, dtype="float32") as llm:
        windows = [x.sliding_window for x in attention_layers(llm)]
        completions = generate(llm, tokens, max_tokens=20)
    assert windows == [None, 40, 40]
    for prompt, completion in zip(tokens, completions, strict=True):
        sample = torch.tensor([prompt + list(completion.token_ids)])
        with torch.inference_mode():
            logprobs = reference(sample).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        assert logprobs.argmax(-1).tolist() == list(completion.token_ids)
        wanted = logprobs.max(-1).values.tolist()
        # fp32, three layers, other kernels for norm, RoPE and attention.
        assert sampled_logprobs(completion) == pytest.approx(wanted, abs=1e-4)


def attention_layers(llm) -> list:
    """vLLM's attention layers of an in-process engine."""
    return list(adapter(llm).kv_layers)


@pytest.mark.slow
def test_compiled_tokens_are_equal_too(tmp_path):
    vllm_graft.register(ARCH, build_qwen3_torchtitan)
    checkpoint, tokens = qwen3_checkpoint(tmp_path), prompts(LENGTHS)
    results = {}
    for arch in (ARCH, None):
        with engine(checkpoint, arch, dtype="float32", enforce_eager=False) as llm:
            results[arch] = generate(llm, tokens)
    for mine, stock in zip(results[ARCH], results[None], strict=True):
        assert list(mine.token_ids) == list(stock.token_ids)
        assert sampled_logprobs(mine) == pytest.approx(sampled_logprobs(stock), abs=1e-4)
