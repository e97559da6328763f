"""Tensor parallelism in the wrong order is refused before the first token, with the right one."""

from __future__ import annotations

import re

import pytest

from tests.dist.launch import torchrun
from tests.support import qwen3_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.slow]

REASONS = {
    "forgotten": "weights are identical on all ranks: tensor parallelism was not applied",
    "before_replacement": "layers.0.attention: .* parallelized before its attention was replaced",
}


@pytest.mark.parametrize("order", REASONS)
def test_every_rank_names_the_rule(order, tmp_path):
    checkpoint = qwen3_checkpoint(tmp_path / "checkpoint", num_hidden_layers=1)
    target = f"tests.dist.wrong_orders:{order}"
    printed = torchrun(2, "tests.dist.refusal_worker", target, str(checkpoint))
    refusals = [line for line in printed.splitlines() if line.startswith("REFUSED")]
    assert len(refusals) == 2 and "SERVED" not in printed
    for refusal in refusals:
        assert re.search(REASONS[order], refusal), refusal
