"""Megatron's tensor parallelism at size 2: one rank's numbers, vLLM's own tokens."""

from __future__ import annotations

import pytest
import torch

from examples.custom_models.megatron_gpt import ARCH
from examples.custom_models.megatron_names import gate_up_rows
from tests.dist.checks import COMPARED, check_two_ranks, run, stock_tokens
from tests.megatron_checkpoints import deepseek_checkpoint, llama_checkpoint, qwen2_checkpoint
from tests.support import qwen3_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MODELS = {
    "qwen3": qwen3_checkpoint,
    "qwen3 tied": lambda folder: qwen3_checkpoint(folder, tie_word_embeddings=True),
    "qwen2": qwen2_checkpoint,
    "llama": llama_checkpoint,
    "deepseek v3": deepseek_checkpoint,
}


@pytest.mark.parametrize("model", MODELS)
def test_two_ranks_do_what_one_does_and_vllms_own_model(model, tmp_path):
    checkpoint = MODELS[model](tmp_path / "checkpoint")
    assert check_two_ranks(ARCH, checkpoint, in_one_piece) == stock_tokens(2, checkpoint)


def in_one_piece(name: str, whole: torch.Tensor) -> torch.Tensor:
    """Gate and up in one piece each: Megatron gives every rank a share of both."""
    if not name.endswith("linear_fc1.weight"):
        return whole
    gate, up = gate_up_rows(whole.shape[0] // 2, 2)
    return whole[gate + up]


@pytest.mark.parametrize("model", ["qwen3", "deepseek v3"])
def test_engine_and_training_agree_in_bfloat16(model, tmp_path):
    for rank in run(2, ARCH, MODELS[model](tmp_path / "checkpoint"), "bfloat16"):
        assert rank["equal"] == COMPARED
