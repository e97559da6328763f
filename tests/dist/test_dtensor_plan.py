"""A user's own DTensor plan, `ColwiseParallel` and `RowwiseParallel`, on a hand-written model."""

from __future__ import annotations

import shutil

import pytest

from tests.dist.checks import COMPARED, check_two_ranks, run

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture
def checkpoint(my_checkpoint, tmp_path):
    return shutil.copytree(my_checkpoint, tmp_path / "checkpoint")


@pytest.mark.parametrize("mesh", ["by_init_device_mesh", "by_context"])
def test_two_ranks_do_what_one_does(mesh, checkpoint):
    check_two_ranks(f"tests.dist.dtensor_plan:{mesh}", checkpoint)


def test_engine_and_training_agree_in_bfloat16(checkpoint):
    for rank in run(2, "tests.dist.dtensor_plan:by_context", checkpoint, "bfloat16"):
        assert rank["equal"] == COMPARED
