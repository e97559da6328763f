"""`LLM(tensor_parallel_size=2)` with vLLM's own worker processes gives one rank's tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

import vllm_graft
from examples.custom_models.deepseek_v3_torchtitan import ARCH as DEEPSEEK
from examples.custom_models.megatron_gpt import ARCH as MEGATRON
from examples.custom_models.qwen3_torchtitan import ARCH as QWEN3
from tests.dist.launch import with_workers
from tests.megatron_checkpoints import deepseek_checkpoint
from tests.moe_checkpoints import deepseek_v3_checkpoint, qwen3_moe_checkpoint
from tests.support import engine, generate, prompts, qwen3_checkpoint
from vllm_graft.serve.registry import BUILT_IN

pytestmark = [pytest.mark.engine, pytest.mark.slow]


MODELS = {
    "qwen3": (QWEN3, qwen3_checkpoint, False),
    "qwen3 moe, experts divided": (QWEN3, qwen3_moe_checkpoint, True),
    "deepseek v3": (DEEPSEEK, deepseek_v3_checkpoint, False),
    "megatron": (MEGATRON, qwen3_checkpoint, False),
    "megatron latent": (MEGATRON, deepseek_checkpoint, False),
}


def of_one_rank(checkpoint: Path, arch: str, tokens: list[list[int]]) -> list[list[int]]:
    """16 greedy tokens for each prompt, by one eager rank."""
    vllm_graft.register(arch, BUILT_IN[arch])
    with engine(checkpoint, arch, dtype="float32") as llm:
        return [list(c.token_ids) for c in generate(llm, tokens, max_tokens=16)]


@pytest.mark.parametrize("model", MODELS)
def test_workers_shard_and_serve(model, tmp_path):
    arch, make, expert_parallel = MODELS[model]
    checkpoint, tokens = make(tmp_path / "checkpoint"), prompts((3, 40, 130))
    alone = of_one_rank(checkpoint, arch, tokens)
    options = {
        "tensor_parallel_size": 2, "enforce_eager": True, "enable_expert_parallel": expert_parallel,
    }  # fmt: skip
    assert with_workers(checkpoint, arch, tokens, options).tokens() == alone
