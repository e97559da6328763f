"""Live weights that change on one of two ranks: every rank serves the new ones, or says why not."""

from __future__ import annotations

import json

import pytest

from tests.dist.launch import torchrun
from tests.support import qwen3_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What each rank saw; ranks that wait for each other run into the limit of `torchrun`."""
    folder = tmp_path_factory.mktemp("changes")
    checkpoint = qwen3_checkpoint(folder / "checkpoint", num_hidden_layers=2)
    torchrun(2, "tests.dist.changes_worker", str(checkpoint), str(folder / "seen"))
    return [json.loads((folder / f"seen.{rank}").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("nan", "rank 1: NaN or infinite values in model.layers.1.attention.wo.weight"),
        ("exchanged", "rank 1: parameters replaced by other tensor objects: model.norm.weight"),
    ],
)
def test_what_one_rank_cannot_serve_raises_on_all(seen, change, reason):
    for rank in seen:
        first, again = rank[change]["reasons"]
        assert first.startswith(reason)
        assert again == first
        assert rank[change]["repaired"] == rank["first"]


def test_changes_reach_the_next_generation_of_all_ranks(seen):
    for rank in seen:
        before = rank["first"]
        for change in ("one shard through .data", "step", "fused step"):
            served, trained = rank[change]
            assert served == trained, change
            assert served != before[0], change
            before = rank[change]
    assert seen[0] == seen[1]
