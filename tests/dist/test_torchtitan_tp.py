"""TorchTitan's own tensor parallelism at size 2: one rank's numbers, vLLM's own tokens."""

from __future__ import annotations

import pytest

from examples.custom_models.deepseek_v3_torchtitan import ARCH as DEEPSEEK
from examples.custom_models.qwen3_torchtitan import ARCH as QWEN3
from tests.dist.checks import COMPARED, check_two_ranks, run, stock_tokens
from tests.moe_checkpoints import deepseek_v3_checkpoint, qwen3_moe_checkpoint
from tests.support import qwen3_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MODELS = {
    "qwen3": (QWEN3, qwen3_checkpoint),
    "qwen3 tied": (QWEN3, lambda folder: qwen3_checkpoint(folder, tie_word_embeddings=True)),
    "qwen3 moe": (QWEN3, qwen3_moe_checkpoint),
    "deepseek v3": (DEEPSEEK, deepseek_v3_checkpoint),
}


@pytest.mark.parametrize("model", MODELS)
def test_two_ranks_do_what_one_does_and_vllms_own_model(model, tmp_path):
    arch, make = MODELS[model]
    checkpoint = make(tmp_path / "checkpoint")
    assert check_two_ranks(arch, checkpoint) == stock_tokens(2, checkpoint)


@pytest.mark.parametrize("model", ["qwen3", "deepseek v3"])
def test_engine_and_training_agree_in_bfloat16(model, tmp_path):
    arch, make = MODELS[model]
    for rank in run(2, arch, make(tmp_path / "checkpoint"), "bfloat16"):
        assert rank["equal"] == COMPARED
