"""A piece of a card's memory through which tensors go to other processes of this host (CUDA IPC).

Torch only. Handles travel as plain values, so that no pickle does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from vllm_graft.train.segment import lying_at


class CardSegment:
    """Memory of `size` bytes on the card `device`, for `ranks` processes that read it.

    Raises:
        torch.OutOfMemoryError: the card has not that much room.
    """

    def __init__(self, size: int, device: torch.device, ranks: int) -> None:
        self._bytes = torch.empty(size, dtype=torch.uint8, device=device)
        self._ranks = ranks

    def view(self, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        """The tensor that lies at `offset` bytes; writing to it writes to the segment."""
        return lying_at(self._bytes, offset, dtype, shape)

    def place(self) -> list[list[Any]]:
        """What each rank opens it by, once: torch counts the openings of each handle."""
        torch.cuda.synchronize(self._bytes.device)
        storage: Any = self._bytes.untyped_storage()
        card = card_of(self._bytes.device)
        return [[card, *map(_plain, storage._share_cuda_()[1:])] for _ in range(self._ranks)]

    def close(self) -> None:
        """Give the memory back; readers must have closed it."""
        del self._bytes
        torch.cuda.ipc_collect()


@contextmanager
def opened(place: Sequence[Any]) -> Iterator[torch.Tensor]:
    """The bytes of another process's segment; copies made in the block are whole after it.

    Raises:
        ValueError: a card that this process does not see.
    """
    card, *handle = place
    cards = visible_cards()
    if card not in cards:
        raise ValueError(f"card {card} is not visible here, only {', '.join(cards)}")
    index = cards.index(card)
    new_shared: Any = torch.UntypedStorage._new_shared_cuda  # type: ignore[attr-defined]
    with torch.cuda.device(index):
        storage = new_shared(index, *map(_raw, handle))
        yield torch.empty(0, dtype=torch.uint8, device=f"cuda:{index}").set_(storage)
        torch.cuda.synchronize(index)


def visible_cards() -> list[str]:
    """UUIDs of the cards that this process sees, in order; none where CUDA is not in use."""
    if not torch.cuda.is_available():
        return []
    return [card_of(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]


def card_of(device: torch.device) -> str:
    """The UUID of a card."""
    return str(torch.cuda.get_device_properties(device).uuid)


def _plain(value: Any) -> Any:
    return {"hex": value.hex()} if isinstance(value, bytes) else value


def _raw(value: Any) -> Any:
    return bytes.fromhex(value["hex"]) if isinstance(value, dict) else value
