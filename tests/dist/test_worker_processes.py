"""`LLM(tensor_parallel_size=2)` with vLLM's own worker processes gives one rank's tokens."""

from __future__ import annotations

import pytest

import vllm_graft
from examples.custom_models.qwen3_torchtitan import ARCH, build_qwen3_torchtitan
from tests.dist.launch import with_workers
from tests.moe_checkpoints import qwen3_moe_checkpoint
from tests.support import engine, generate, prompts, qwen3_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.mark.parametrize(
    ("make", "expert_parallel"), [(qwen3_checkpoint, False), (qwen3_moe_checkpoint, True)]
)
def test_workers_shard_and_serve(make, expert_parallel, tmp_path):
    checkpoint, tokens = make(tmp_path / "checkpoint"), prompts((3, 40, 130))
    vllm_graft.register(ARCH, build_qwen3_torchtitan)
    with engine(checkpoint, ARCH, dtype="float32") as llm:
        alone = [list(c.token_ids) for c in generate(llm, tokens, max_tokens=16)]
    options = {
        "tensor_parallel_size": 2, "enforce_eager": True, "enable_expert_parallel": expert_parallel,
    }  # fmt: skip
    assert with_workers(checkpoint, ARCH, tokens, options).tokens() == alone
