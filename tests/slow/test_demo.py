"""`make demo` in its short form: every check of its three tables passes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = ("config.json", "model.safetensors", "tokenizer.json")
CHECKS = 5 + 6 + 2
"""Of Qwen3, of DeepSeek V3 and of reinforcement learning."""


@pytest.mark.slow
@pytest.mark.engine
def test_demo_passes_all_its_checks_and_leaves_checkpoints(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.demo", "--quick", "--output", str(tmp_path)]
    demo = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    output = demo.stdout + demo.stderr
    assert demo.returncode == 0, output
    assert demo.stdout.count(" pass ") == CHECKS, output
    assert "FAIL" not in demo.stdout
    for folder in (tmp_path, tmp_path / "deepseek_v3"):
        assert all((folder / name).is_file() for name in FILES)
    assert (tmp_path / "rl" / "training.png").is_file()
