"""Two ranks each read their half of a checkpoint, dense or with half of the experts each."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support import ROOT

pytestmark = pytest.mark.slow

SMALL = ("--hidden-size=256", "--intermediate-size=512", "--vocab-size=1000")
MEGATRON = ("--arch=MegatronModel",)
DTENSOR = ("--arch=DTensor",)


def figures(out, *options):
    """What the benchmark measures with these options."""
    command = [sys.executable, "benchmarks/load_shards.py", "--json", str(out), *options]
    subprocess.run(command, cwd=ROOT, check=True)
    return json.loads(out.read_text())


@pytest.mark.parametrize("options", [(), ("--num-experts=8", "--expert-parallel"), MEGATRON, DTENSOR])
def test_each_rank_takes_what_it_keeps(options, tmp_path):
    seen = figures(tmp_path / "figures.json", *SMALL, *options)
    for taken in seen["taken_bytes"]:
        # Norms and routers are whole on every rank.
        assert 0.5 < taken / seen["checkpoint_bytes"] < 0.51


@pytest.mark.parametrize("options", [(), MEGATRON, DTENSOR])
def test_each_rank_has_less_than_60_percent_read_from_disk(options, tmp_path):
    seen = figures(tmp_path / "figures.json", *options)
    if not any(seen["disk_alone_bytes"]):
        pytest.skip("the temporary folder is not on a disk")
    for read in seen["disk_alone_bytes"]:
        assert 0.5 < read / seen["checkpoint_bytes"] < 0.6
