"""A digest of a tensor's bytes, made where the tensor lies. Torch only."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch

from vllm_graft.weights.errors import WeightError

_CHUNK = 1 << 17
"""Words of 8 bytes that are multiplied at once: 1 MiB stays in the cache."""


@torch.no_grad()
def digest(tensor: torch.Tensor) -> int:
    """A 64-bit digest of the bytes of `tensor` and their order, equal in every process.

    Words times odd random factors, added up modulo 2**64: any change of one word shows,
    others are missed with probability 2**-63 or so. Not cryptographic.
    """
    words = _words(tensor)
    while len(words) > 1:
        factors = _factors(words.device)
        words = torch.stack([_dot(chunk, factors[: len(chunk)]) for chunk in words.split(_CHUNK)])
    return int(words) % 2**64 if len(words) else 0


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    # torch.dot takes no integers on CUDA.
    return torch.dot(a, b) if a.device.type == "cpu" else (a * b).sum()


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of `tensor` as int64 words, zeros behind an odd end."""
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if raw.numel() % 8 or raw.data_ptr() % 8:
        raw = torch.nn.functional.pad(raw, (0, -raw.numel() % 8))
    return raw.view(torch.int64)


@functools.cache
def _factors(device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-(2**63), 2**63 - 1, (_CHUNK,), generator=generator)
    return (values | 1).to(device)


def digests_of(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, int]:
    """The digest of each named tensor."""
    return {name: digest(tensor) for name, tensor in tensors}


def compare(sent: dict[str, int], held: dict[str, int]) -> None:
    """Raise unless the same tensors are on both sides of a push.

    Raises:
        WeightError: naming those with other bytes.
    """
    others = [name for name in {**sent, **held} if sent.get(name) != held.get(name)]
    if others:
        raise WeightError(
            f"{len(others)} tensors of the engine are not those that were sent: "
            f"{', '.join(others[:8])}"
        )
