"""`ParallelContext` in an engine with two ranks, and random weights there."""

from __future__ import annotations

import json

import pytest

from tests.dist.launch import torchrun
from tests.support import qwen3_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_groups_and_mesh_are_vllms_and_dummy_weights_are_served(tmp_path):
    """Dummy weights of one shape are the same on both ranks, though the model is sharded."""
    checkpoint = qwen3_checkpoint(tmp_path / "checkpoint", num_hidden_layers=1)
    arguments = ("tests.dist.vllms_groups:build", str(checkpoint))
    options = json.dumps({"load_format": "dummy"})
    printed = torchrun(2, "tests.dist.refusal_worker", *arguments, options)
    assert printed.count("VLLMS GROUPS") == printed.count("SERVED") == 2, printed
