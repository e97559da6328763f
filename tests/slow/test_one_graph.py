"""Compiled models are one graph: no break sends a decode step back to Python."""

from __future__ import annotations

import pytest
from torch._dynamo.utils import counters
from vllm import SamplingParams

import vllm_graft
from examples.custom_models import deepseek_v3_torchtitan, megatron_gpt, qwen3_torchtitan
from tests.moe_checkpoints import deepseek_v3_checkpoint
from tests.support import adapter, engine, prompts, qwen3_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.slow]


FAMILIES = {
    "TorchTitan": (qwen3_torchtitan.build_qwen3_torchtitan, qwen3_checkpoint),
    "TorchTitan MLA": (
        deepseek_v3_torchtitan.build_deepseek_v3_torchtitan,
        deepseek_v3_checkpoint,
    ),
    "Megatron": (megatron_gpt.build_megatron_model, qwen3_checkpoint),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compiled_model_is_one_graph(family, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    factory, checkpoint = FAMILIES[family]
    vllm_graft.register("OneGraph", factory)
    counters.clear()
    with engine(checkpoint(tmp_path / "model"), "OneGraph", enforce_eager=False) as llm:
        assert counters["stats"]["unique_graphs"] == 1
        # Without log-probabilities, whose ranks vLLM counts in a compiled function of its own.
        tokens = [{"prompt_token_ids": prompt} for prompt in prompts((1, 40))]
        llm.generate(tokens, SamplingParams(max_tokens=4, ignore_eos=True, detokenize=False))
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]
        assert adapter(llm)._traced
