"""Qwen3-MoE through TorchTitan in the engine: vLLM's tokens, training's bits, one routing."""

from __future__ import annotations

import pytest

import vllm_graft
from examples.custom_models.qwen3_torchtitan import ARCH, build_qwen3_torchtitan
from tests.moe_checkpoints import qwen3_moe_checkpoint
from tests.serve.moe_checks import (
    assert_equal_tokens,
    check_exactness,
    check_routing,
    completions,
)

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    vllm_graft.register(ARCH, build_qwen3_torchtitan)
    return qwen3_moe_checkpoint(tmp_path_factory.mktemp("qwen3_moe"))


def test_greedy_tokens_are_those_of_vllms_own_model(checkpoint):
    mine = completions(checkpoint, ARCH)
    assert_equal_tokens(mine, completions(checkpoint, None))
    assert len({token for completion in mine for token in completion.token_ids}) > 100


def test_dense_layers_between_sparse_ones(tmp_path):
    vllm_graft.register(ARCH, build_qwen3_torchtitan)
    mixed = {"mlp_only_layers": [1], "norm_topk_prob": False}
    checkpoint = qwen3_moe_checkpoint(tmp_path, **mixed)
    assert_equal_tokens(completions(checkpoint, ARCH), completions(checkpoint, None))


@pytest.mark.parametrize(
    "eager", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["eager", "compiled"]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_token_has_the_logprob_of_training(checkpoint, dtype, eager):
    chunked = {"max_num_batched_tokens": 192, "enable_chunked_prefill": True}
    check_exactness(checkpoint, ARCH, dtype=dtype, enforce_eager=eager, **chunked)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_engine_and_training_choose_the_same_experts(checkpoint, dtype):
    assert check_routing(checkpoint, ARCH, dtype=dtype) == 1 + 5 + 64 + 130 + 4 * 19
