"""TorchTitan's experts divided between two ranks: one rank's numbers, vLLM's own tokens."""

from __future__ import annotations

import pytest

from tests.dist.checks import COMPARED, check_two_ranks, run, stock_tokens
from tests.dist.test_torchtitan_tp import MODELS

pytestmark = [pytest.mark.engine, pytest.mark.slow]

WITH_EXPERTS = ["qwen3 moe", "deepseek v3"]
STACKS = {"w1_EFD": (4, 96, 128), "w2_EDF": (4, 128, 96), "w3_EFD": (4, 96, 128)}
"""Half of the 8 experts, each whole."""


@pytest.mark.parametrize("model", WITH_EXPERTS)
def test_two_ranks_do_what_one_does_and_vllms_own_model(model, tmp_path):
    arch, make = MODELS[model]
    checkpoint = make(tmp_path / "checkpoint")
    tokens = check_two_ranks(arch, checkpoint, enable_expert_parallel=True)
    assert tokens == stock_tokens(2, checkpoint)


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
@pytest.mark.parametrize("model", WITH_EXPERTS)
def test_whole_experts_and_engine_and_training_agree_in_bfloat16(model, eager, tmp_path):
    arch, make = MODELS[model]
    checkpoint = make(tmp_path / "checkpoint")
    options = {"enable_expert_parallel": True, "enforce_eager": eager}
    for rank in run(2, arch, checkpoint, "bfloat16", **options):
        assert rank["equal"] == COMPARED
        stacks = {name: s for name, s in rank["shapes"].items() if "inner_experts" in name}
        assert stacks
        assert all(shape == STACKS[name.split(".")[-1]] for name, shape in stacks.items())
