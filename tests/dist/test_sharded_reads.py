"""Two ranks each read their half of a checkpoint, dense or with half of the experts each."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support import ROOT

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("experts", [(), ("--num-experts=8", "--expert-parallel")])
def test_each_rank_takes_what_it_keeps(experts, tmp_path):
    sizes = ["--hidden-size=256", "--intermediate-size=512", "--vocab-size=1000", *experts]
    out = tmp_path / "figures.json"
    subprocess.run(
        [sys.executable, "benchmarks/load_shards.py", *sizes, "--json", out], cwd=ROOT, check=True
    )
    figures = json.loads(out.read_text())
    for taken in figures["taken_bytes"]:
        # Norms and routers are whole on every rank.
        assert 0.5 < taken / figures["checkpoint_bytes"] < 0.51
