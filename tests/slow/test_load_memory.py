"""Loading needs less than one layer plus 256 MB beside the model, as the benchmark measures it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.support import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("option", [[], ["--fp8"]], ids=["bf16", "fp8"])
def test_the_peak_is_within_the_limit(option, tmp_path):
    command = [sys.executable, "benchmarks/load_memory.py", "--layers", "2", "--shards", "3"]
    done = subprocess.run(
        [*command, *option, "--json", str(tmp_path / "figures.json")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert 0 <= figures["extra_bytes"] < figures["limit_bytes"]
    assert figures["numbers"] > figures["layer_bytes"]  # two bf16 layers and the vocabulary
