"""TorchTitan's FSDP2, optimizers and schedule on two ranks, feeding an engine by `push_weights`."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import pytest

from tests.dist.launch import torchrun


@pytest.mark.slow
@pytest.mark.engine
def test_sharded_ranks_and_the_engine_agree_while_the_reward_rises(tmp_path: Path) -> None:
    before = {path.name for path in Path("/dev/shm").iterdir()}
    torchrun(2, "examples.rl.torchtitan_fsdp", "--steps", "16", "--output", str(tmp_path))
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps] == list(range(1, 17))
    assert all(s["kl"] == 0.0 and s["unequal"] == 0 for s in steps)
    # 32 problems, 8 answers each, of at least one token.
    assert all(s["tokens"] >= 256 for s in steps)
    rewards = [s["reward"] for s in steps]
    assert mean(rewards[-4:]) - mean(rewards[:4]) >= 0.03
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in Path("/dev/shm").iterdir()} <= before
