"""TorchTitan's own tensor parallelism at size 2 against one rank: tokens, bits, loss, gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from examples.custom_models.deepseek_v3_torchtitan import ARCH as DEEPSEEK
from examples.custom_models.qwen3_torchtitan import ARCH as QWEN3
from tests.dist.launch import torchrun
from tests.moe_checkpoints import deepseek_v3_checkpoint, qwen3_moe_checkpoint
from tests.support import qwen3_checkpoint, relative_error

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MODELS = {
    "qwen3": (QWEN3, qwen3_checkpoint),
    "qwen3 tied": (QWEN3, lambda folder: qwen3_checkpoint(folder, tie_word_embeddings=True)),
    "qwen3 moe": (QWEN3, qwen3_moe_checkpoint),
    "deepseek v3": (DEEPSEEK, deepseek_v3_checkpoint),
}


def run(ranks: int, arch: str, checkpoint: Path, dtype: str) -> list[dict]:
    """What every rank of `serve_worker` saw."""
    result = checkpoint.parent / f"{dtype}.{ranks}"
    torchrun(ranks, "tests.dist.serve_worker", arch, str(checkpoint), dtype, str(result))
    return [torch.load(f"{result}.{rank}") for rank in range(ranks)]


@pytest.mark.parametrize("model", MODELS)
def test_two_ranks_do_what_one_does(model, tmp_path):
    arch, make = MODELS[model]
    checkpoint = make(tmp_path / "checkpoint")
    (alone,) = run(1, arch, checkpoint, "float32")
    ranks = run(2, arch, checkpoint, "float32")
    for rank in ranks:
        assert rank["tokens"] == alone["tokens"]
        assert rank["equal"] == (96, 96)
        halves = [n for n, shape in rank["shapes"].items() if shape != alone["shapes"][n]]
        assert len(halves) > len(rank["shapes"]) // 3
        # fp32: row-parallel products add two partial sums.
        assert rank["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        for name, grad in alone["grads"].items():
            assert relative_error(rank["grads"][name], grad) < 1e-4, name
        for mine, other in zip(rank["logprobs"], alone["logprobs"], strict=True):
            assert mine == pytest.approx(other, abs=1e-4)
    assert ranks[0]["logprobs"] == ranks[1]["logprobs"]


@pytest.mark.parametrize("model", ["qwen3", "deepseek v3"])
def test_engine_and_training_agree_in_bfloat16(model, tmp_path):
    arch, make = MODELS[model]
    for rank in run(2, arch, make(tmp_path / "checkpoint"), "bfloat16"):
        assert rank["equal"] == (96, 96)
