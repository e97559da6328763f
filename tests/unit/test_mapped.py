"""Mapped checkpoints: of a cold file a rank has its share read, and no more."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import time
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed import tensor as tensor_parallel
from torch.distributed.tensor import distribute_tensor, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from vllm_graft import RowOrder, load_external_weights
from vllm_graft.weights.mapped import MappedFiles, _runs
from vllm_graft.weights.shards import Shard, local, mark_shard, select

PAGE = mmap.PAGESIZE
ROWS, COLUMNS = 512, 4096
"""8 MB of float32; half a row is two pages."""


@pytest.fixture
def rank(request):
    """This process is one of two ranks."""
    dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=2)
    yield request.param
    dist.destroy_process_group()


@pytest.fixture
def cold(tmp_path):
    """A checkpoint of three matrices that is not in the page cache."""
    path = tmp_path / "cold.safetensors"
    save_file({name: torch.rand(ROWS, COLUMNS) for name in "abc"}, path)
    file = os.open(path, os.O_RDWR)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    if cached(file):
        pytest.skip("the temporary folder is not on a disk")
    yield path, file
    os.close(file)


def cached(file: int) -> set[int]:
    """The pages of a file in the page cache."""
    size = os.fstat(file).st_size
    with mmap.mmap(file, size) as view:
        start = ctypes.c_char.from_buffer(view)
        flags = (ctypes.c_ubyte * -(-size // PAGE))()
        assert ctypes.CDLL(None).mincore(
            ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), flags
        ) == 0  # fmt: skip
        del start
    return {page for page, flag in enumerate(flags) if flag & 1}


def half(dim: int, rank: int, backend: str) -> nn.Module:
    """A rank's halves of the three matrices."""
    module = nn.Module()
    for name in "abc":
        module.register_parameter(name, BACKENDS[backend](dim, rank))
    return module


def marked(dim: int, rank: int) -> nn.Parameter:
    """A plain tensor, as TorchTitan and Megatron keep shares."""
    mine = nn.Parameter(torch.zeros(ROWS, COLUMNS).chunk(2, dim)[rank].clone())
    mark_shard(mine, Shard(dim, rank, None))
    return mine


def dtensor(dim: int, rank: int) -> nn.Parameter:
    mesh = init_device_mesh("cpu", (2,))
    placements = [tensor_parallel.Shard(dim)]
    whole = torch.zeros(ROWS, COLUMNS)
    return nn.Parameter(distribute_tensor(whole, mesh, placements, src_data_rank=None))


BACKENDS = {"marked": marked, "dtensor": dtensor}


@pytest.mark.parametrize(
    ("kind", "rank", "backend"),
    [
        ("rows", 0, "marked"),
        ("columns", 1, "marked"),
        ("reordered", 1, "marked"),
        ("rows", 1, "dtensor"),
        ("columns", 0, "dtensor"),
    ],
    indirect=["rank"],
)
def test_the_share_is_read_and_nothing_ahead(cold, kind, rank, backend):
    path, file = cold
    dim, order = int(kind == "columns"), torch.randperm(ROWS)
    size = (ROWS, COLUMNS)[dim] // 2
    share = [slice(None), slice(None)]
    share[dim] = slice(rank * size, (rank + 1) * size)
    region = [order[share[0]], share[1]] if kind == "reordered" else share
    before, wanted = set(), set()

    def stream(opened):
        for name in "abc":
            tensor = opened.get_tensor(name)
            if name == "a":
                before.update(settled(file))
            start = start_of(path, name)
            wanted.update({start // PAGE}, pages(tensor, region, tensor.data_ptr() - start))
            yield name, tensor

    names = {n: RowOrder(n, order) if kind == "reordered" else n for n in "abc"}
    module = half(dim, rank, backend)
    with safe_open(path, framework="pt") as opened:
        load_external_weights(module, stream(opened), names)
        seen = cached(file)
        whole = opened.get_tensor("b")
        assert torch.equal(local(module.b), select(whole, tuple(region)))
    assert wanted <= seen
    assert seen - before <= wanted


def settled(file: int) -> set[int]:
    """`cached`, with what was read ahead for the first tensor, before Graft sees the file."""
    seen: list[set[int]] = [set(), cached(file)]
    while seen[-1] != seen[-2]:
        time.sleep(0.2)
        seen.append(cached(file))
    return seen[-1]


def start_of(path, name: str) -> int:
    """The first byte of a tensor in a safetensors file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return 8 + length + json.loads(file.read(length))[name]["data_offsets"][0]


def pages(tensor: torch.Tensor, region, base: int) -> set[int]:
    """The pages of `region`, counted from the address `base`, element by element."""
    places = torch.arange(tensor.numel()).view(tensor.shape)
    bytes_ = tensor.data_ptr() - base + select(places, tuple(region)) * tensor.element_size()
    last = bytes_ + tensor.element_size() - 1
    return set((bytes_ // PAGE).unique().tolist()) | set((last // PAGE).unique().tolist())


def index(size: int):
    """A slice or indices of a dimension, empty ones too."""
    ends = st.tuples(st.integers(0, size), st.integers(0, size)).map(sorted)
    indices = st.lists(st.integers(0, size - 1), unique=True).map(
        lambda rows: torch.tensor(rows, dtype=torch.long)
    )
    return ends.map(lambda e: slice(*e)) | indices | st.just(slice(None))


@given(st.tuples(index(5), index(7), index(1500)), st.integers(0, 3000))
def test_runs_are_the_pages_of_the_region_in_order_and_apart(region, offset):
    tensor = torch.empty(5 * 7 * 1500 + 3000)[offset : offset + 5 * 7 * 1500].view(5, 7, 1500)
    runs = list(_runs(tensor, region))
    covered = [page for run in runs for page in range(run.start // PAGE, run.stop // PAGE)]
    wanted = pages(tensor, region, 0)
    assert wanted <= set(covered)
    assert all(one.stop < next.start for one, next in pairwise(runs))
    assert len(covered) == len(set(covered))
    if not isinstance(region[2], torch.Tensor):
        assert set(covered) == wanted


def test_memory_that_is_no_file_is_left_alone():
    files = MappedFiles()
    assert not files.holds(torch.zeros(1_000_000))
    assert not files.holds(torch.empty(3, device="meta"))
    assert files._known == (None, range(0))
