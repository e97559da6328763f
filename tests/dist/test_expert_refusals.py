"""Experts that cannot be divided as asked are refused before the first token."""

from __future__ import annotations

import re

import pytest

from examples.custom_models.qwen3_torchtitan import ARCH
from tests.dist.test_refusals import refusals
from tests.moe_checkpoints import qwen3_moe_checkpoint
from tests.support import qwen3_checkpoint
from vllm_graft.serve.registry import BUILT_IN

pytestmark = [pytest.mark.engine, pytest.mark.slow]

STACK = r"layers\.0\.moe\.routed_experts\.inner_experts"


@pytest.mark.parametrize(
    ("experts", "options", "reason"),
    [
        (7, {}, f"{STACK}: num_experts=7 is not divisible by expert_parallel_size=2"),
        (8, {"enable_ep_weight_filter": True}, "enable_ep_weight_filter=True hides .* leave it"),
    ],
)
def test_experts_and_options_that_do_not_fit(experts, options, reason, tmp_path):
    sizes = {"num_hidden_layers": 1, "num_experts": experts}
    checkpoint = qwen3_moe_checkpoint(tmp_path / "checkpoint", **sizes)
    for refusal in refusals(BUILT_IN[ARCH], checkpoint, enable_expert_parallel=True, **options):
        assert re.search(reason, refusal), refusal


def test_a_plan_for_ranks_with_different_tokens(tmp_path):
    checkpoint = qwen3_moe_checkpoint(tmp_path / "checkpoint", num_hidden_layers=1)
    for refusal in refusals("tests.dist.wrong_orders:for_other_tokens", checkpoint):
        assert re.search(f"{STACK}: sharded with enable_ep=True", refusal), refusal


def test_expert_parallelism_of_a_dense_model(tmp_path):
    checkpoint = qwen3_checkpoint(tmp_path / "checkpoint", num_hidden_layers=1)
    for refusal in refusals(BUILT_IN[ARCH], checkpoint, enable_expert_parallel=True):
        # vLLM's own words.
        assert "Number of experts in the model must be greater than 0" in refusal
