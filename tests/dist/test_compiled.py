"""Compiled serving on two ranks: one eager rank's tokens, the training forward's bits."""

from __future__ import annotations

import pytest

from examples.custom_models.deepseek_v3_torchtitan import ARCH as DEEPSEEK
from examples.custom_models.megatron_gpt import ARCH as MEGATRON
from examples.custom_models.qwen3_torchtitan import ARCH as QWEN3
from tests.dist.checks import COMPARED, run
from tests.moe_checkpoints import deepseek_v3_checkpoint
from tests.support import qwen3_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.slow]

MODELS = {
    "qwen3": (QWEN3, qwen3_checkpoint),
    "deepseek v3": (DEEPSEEK, deepseek_v3_checkpoint),
    "megatron": (MEGATRON, qwen3_checkpoint),
}


@pytest.fixture(autouse=True)
def nothing_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))


@pytest.mark.parametrize("model", MODELS)
def test_two_compiled_ranks_give_the_tokens_of_one_eager(model, tmp_path):
    arch, make = MODELS[model]
    checkpoint = make(tmp_path / "checkpoint")
    (alone,) = run(1, arch, checkpoint, "float32")
    assert alone["compiled"] == 0
    for rank in run(2, arch, checkpoint, "float32", enforce_eager=False):
        assert rank["compiled"] == 1
        assert rank["tokens"] == alone["tokens"]
        assert rank["equal"] == COMPARED


@pytest.mark.parametrize("model", ["qwen3", "deepseek v3"])
def test_compiled_engine_and_training_agree_in_bfloat16(model, tmp_path):
    arch, make = MODELS[model]
    for rank in run(2, arch, make(tmp_path / "checkpoint"), "bfloat16", enforce_eager=False):
        assert rank["compiled"] == 1
        assert rank["equal"] == COMPARED
