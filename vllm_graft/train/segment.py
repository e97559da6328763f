"""A piece of shared memory through which tensors go to other processes of this host.

Linux only: a POSIX segment is a file in `/dev/shm`. Torch only.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from uuid import uuid4

import torch

ALIGNMENT = 64
_FOLDER = Path("/dev/shm")  # noqa: S108 - where Linux keeps POSIX segments
_NAME = re.compile(r"graft-push-[0-9a-f]{32}")


class Segment:
    """Shared memory of `size` bytes that only this user's processes can open.

    It is gone after `close`, and when this process dies: the resource tracker that
    Python starts with it outlives the process and removes it.

    Raises:
        MemoryError: the host's shared memory has not that much room.
    """

    def __init__(self, size: int) -> None:
        free = shutil.disk_usage(_FOLDER).free
        if free < size:
            raise MemoryError(
                f"{_FOLDER} has {free / 2**20:.0f} MiB free, and the push needs "
                f"{size / 2**20:.0f}; give it more (docker run --shm-size)"
            )
        self._memory = SharedMemory(f"graft-push-{uuid4().hex}", create=True, size=size)
        self.name = self._memory.name

    def view(self, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        """The tensor that lies at `offset` bytes; writing to it writes to the segment."""
        size = nbytes(dtype, shape)
        flat = torch.from_file(  # a mapping of its own: `buf` would keep `close` from closing
            str(_FOLDER / self.name), shared=True, size=offset + size, dtype=torch.uint8
        )
        return lying_at(flat, offset, dtype, shape)

    def place(self) -> str:
        """What other processes open it by."""
        return self.name

    def close(self) -> None:
        """Remove the segment; processes that read it keep what they have."""
        self._memory.close()
        self._memory.unlink()


def read(name: str, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """A copy of the tensor at `offset` bytes of another process's segment.

    Raises:
        ValueError: no name of a segment, or a place outside it.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no segment of a weight push")
    path, end = _FOLDER / name, offset + nbytes(dtype, shape)
    if offset < 0 or offset % ALIGNMENT or end > path.stat().st_size:
        raise ValueError(f"bytes {offset} to {end} do not lie in {name}")
    flat = torch.from_file(str(path), shared=False, size=end, dtype=torch.uint8)
    return lying_at(flat, offset, dtype, shape).clone()


def lying_at(
    flat: torch.Tensor, offset: int, dtype: torch.dtype, shape: Sequence[int]
) -> torch.Tensor:
    """The tensor at `offset` of the bytes `flat`, sharing their memory."""
    return flat[offset : offset + nbytes(dtype, shape)].view(dtype).view(shape)


def nbytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Bytes of a contiguous tensor."""
    return dtype.itemsize * torch.Size(shape).numel()
