"""The ranks that a test runs on: one under plain pytest, all of them under torchrun."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist


@pytest.fixture(scope="module")
def distributed_setup() -> Iterator[tuple[int, int]]:
    """Rank and world size; under torchrun a process group exists meanwhile."""
    if "RANK" not in os.environ:
        yield 0, 1
        return
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend="nccl" if on_cuda else "gloo")
    yield dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
