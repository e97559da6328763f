"""Telling the kernel which parts of a mapped checkpoint a rank will read.

Left alone, the kernel reads ahead: past a share of rows, over the gaps between shares of
columns, and from the start of every tensor, which safetensors touches. So a file of which
a rank keeps a part is advised to be read at random, and what the rank keeps is announced
just before it is copied. All of this is advice: where it cannot be given (no Linux,
storage that is no file), the same bytes are read in the kernel's own way.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from functools import cache
from itertools import pairwise

import torch

from vllm_graft.weights.shards import Region

_CHUNK = 128 * 1024
"""Bytes announced at a time: the kernel cuts off what is longer than its read-ahead."""
_PAGE = mmap.PAGESIZE


class MappedFiles:
    """The files that tensors of one load lie in, each advised once."""

    def __init__(self) -> None:
        self._known: tuple[torch.Tensor | None, range] = (None, range(0))

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` lies in a mapped file, of which nothing is read ahead from now on."""
        if tensor.device.type != "cpu":
            return False
        start = tensor.data_ptr()
        if start not in self._known[1]:
            span = _mapping(start)
            # The tensor keeps its file mapped, so no other file can take these addresses.
            self._known = (tensor if span else None, span)
            if span:
                _advise(span, mmap.MADV_RANDOM)
        return start in self._known[1]


def announce(tensor: torch.Tensor, region: Region) -> None:
    """Have the kernel start to read `region` of a `tensor` in a mapped file, and no more."""
    if not tensor.is_contiguous():
        return
    for run in _runs(tensor, region):
        for start in range(run.start, run.stop, _CHUNK):
            _advise(range(start, min(start + _CHUNK, run.stop)), mmap.MADV_WILLNEED)


def _runs(tensor: torch.Tensor, region: Region) -> Iterator[range]:
    """The addresses of `region`, as runs of whole pages in ascending order."""
    cut = [d for d, index in enumerate(region) if not _is_all(index, tensor.shape[d])]
    starts, length = torch.zeros(1, dtype=torch.long), tensor.numel()
    for dim in range(cut[-1] + 1 if cut else 0):
        index, length = region[dim], tensor.stride(dim)
        if dim == cut[-1] and isinstance(index, slice):
            first, stop, _ = index.indices(tensor.shape[dim])
            places, length = torch.tensor([first]), length * (stop - first)
        else:
            places = torch.arange(tensor.shape[dim])[index].sort().values
        starts = (starts[:, None] + places * tensor.stride(dim)).flatten()
    if length <= 0 or not len(starts):
        return
    first_byte = tensor.data_ptr() + starts * tensor.element_size()
    first_page = first_byte // _PAGE
    last_page = (first_byte + length * tensor.element_size() - 1) // _PAGE
    apart = ((first_page[1:] - last_page[:-1]) > 1).nonzero().flatten() + 1
    for begin, end in pairwise([0, *apart.tolist(), len(starts)]):
        yield range(int(first_page[begin]) * _PAGE, (int(last_page[end - 1]) + 1) * _PAGE)


def _is_all(index: slice | torch.Tensor, size: int) -> bool:
    return isinstance(index, slice) and index.indices(size) == (0, size, 1)


def _mapping(address: int) -> range:
    """The addresses of the mapped file around `address`; empty where there is none."""
    try:
        with open("/proc/self/maps") as maps:
            for line in maps:
                span, _, _, _, inode = line.split(maxsplit=5)[:5]
                start, stop = (int(end, 16) for end in span.split("-"))
                if start <= address < stop:
                    return range(start, stop) if inode != "0" else range(0)
    except OSError:
        pass
    return range(0)


def _advise(span: range, advice: int) -> None:
    _libc().madvise(ctypes.c_void_p(span.start), ctypes.c_size_t(len(span)), advice)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
