"""Megatron's tensor parallelism at size 2: one rank's tokens and gradients, vLLM's own tokens."""

from __future__ import annotations

import json

import pytest
import torch

from examples.custom_models.megatron_gpt import ARCH
from examples.custom_models.megatron_names import gate_up_rows
from tests.dist.launch import torchrun
from tests.dist.test_torchtitan_tp import run
from tests.megatron_checkpoints import deepseek_checkpoint, llama_checkpoint, qwen2_checkpoint
from tests.support import qwen3_checkpoint, relative_error

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MODELS = {
    "qwen3": qwen3_checkpoint,
    "qwen3 tied": lambda folder: qwen3_checkpoint(folder, tie_word_embeddings=True),
    "qwen2": qwen2_checkpoint,
    "llama": llama_checkpoint,
    "deepseek v3": deepseek_checkpoint,
}


@pytest.mark.parametrize("model", MODELS)
def test_two_ranks_do_what_one_does(model, tmp_path):
    checkpoint = MODELS[model](tmp_path / "checkpoint")
    (alone,) = run(1, ARCH, checkpoint, "float32")
    ranks = run(2, ARCH, checkpoint, "float32")
    for rank in ranks:
        assert rank["tokens"] == alone["tokens"]
        assert rank["equal"] == (96, 96)
        halves = [n for n, shape in rank["shapes"].items() if shape != alone["shapes"][n]]
        assert len(halves) > len(rank["shapes"]) // 3
        # fp32: row-parallel products add two partial sums.
        assert rank["loss"] == pytest.approx(alone["loss"], rel=1e-6)
        for name, grad in alone["grads"].items():
            assert relative_error(in_one_piece(name, rank["grads"][name]), grad) < 1e-5, name
    assert ranks[0]["logprobs"] == ranks[1]["logprobs"]


def in_one_piece(name: str, whole: torch.Tensor) -> torch.Tensor:
    """Gate and up in one piece each: Megatron gives every rank a share of both."""
    if not name.endswith("linear_fc1.weight"):
        return whole
    gate, up = gate_up_rows(whole.shape[0] // 2, 2)
    return whole[gate + up]


@pytest.mark.parametrize("model", ["qwen3", "deepseek v3"])
def test_engine_and_training_agree_in_bfloat16(model, tmp_path):
    for rank in run(2, ARCH, MODELS[model](tmp_path / "checkpoint"), "bfloat16"):
        assert rank["equal"] == (96, 96)


@pytest.mark.parametrize("model", ["qwen3", "llama", "deepseek v3"])
def test_greedy_tokens_are_those_of_vllms_own_model_on_two_ranks(model, tmp_path):
    checkpoint = MODELS[model](tmp_path / "checkpoint")
    results = []
    for arch in (ARCH, "stock"):
        result = tmp_path / f"{arch}.json"
        torchrun(2, "tests.dist.tokens_worker", arch, str(checkpoint), str(result))
        results.append(json.loads(result.read_text()))
    mine, stock = results
    assert len(mine) == 16 and mine == stock
