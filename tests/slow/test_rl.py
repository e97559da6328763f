"""The reinforcement-learning example in its short form, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "examples.rl.grpo_arithmetic")
FIELDS = {"step", "reward", "loss", "kl", "unequal", "tokens", "tokens_per_second", "seconds"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=500, check=False
    )


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.parametrize("processes", [(), ("--two-processes",)], ids=["one", "two"])
def test_the_reward_rises_and_engine_and_trainer_agree(
    tmp_path: Path, processes: tuple[str, ...]
) -> None:
    done = run("--quick", *processes, "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps] == list(range(1, 51))
    assert all(s.keys() == FIELDS for s in steps)
    assert all(s["kl"] == 0.0 and s["unequal"] == 0 for s in steps)
    # 64 problems, 8 answers each, of at least one token.
    assert all(s["tokens"] >= 512 for s in steps)
    rewards = [s["reward"] for s in steps]
    assert mean(rewards[-10:]) - mean(rewards[:10]) >= 0.15
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "checkpoint" / "model.safetensors").is_file()


def test_too_few_steps_are_refused() -> None:
    done = run("--steps", "5")
    assert done.returncode == 2
    assert "use at least 20" in done.stderr
