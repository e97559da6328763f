"""bf16 products by packed weights on processors with AVX-512, but without AMX.

One to eight rows take as long as reading the weight; oneDNN's packed products take up to half as
long again (docs/performance.md). A row's bits do not depend on the rows around it, by
construction. The order of additions along K can be made that of oneDNN, which adds up chunks.

Legend: R rows, K inputs, M outputs of one of several weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from vllm_graft.exact import fake_op
from vllm_graft.kernels.build import AVX512_BF16, load_operators

PANEL = 32
"""Outputs that lie together, as in `packed_bf16.cpp`."""


@functools.cache
def available() -> bool:
    """Whether this machine multiplies so, and the operator could be built."""
    # With AMX oneDNN multiplies many rows several times as fast.
    fits = torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
    if not (fits and load_operators(Path(__file__).with_suffix(".cpp"), flags=AVX512_BF16)):
        return False
    fake_op("packed_bf16", _fake)
    fake_op("packed_bf16_experts", _fake)
    return True


def _fake(
    x: torch.Tensor,
    _: torch.Tensor | None,
    handle: torch.Tensor,
    outputs: Sequence[int],
    chunk: int,
) -> list[torch.Tensor]:
    return [x.new_empty(x.shape[0], count) for count in outputs]


def takes(weight: torch.Tensor) -> bool:
    """Whether a weight `[..., M, K]` can be packed: pairs of inputs are multiplied at once."""
    return weight.dtype == torch.bfloat16 and weight.shape[-1] % 2 == 0 and available()


@dataclass(frozen=True)
class Packed:
    """Keeps packed weights alive."""

    pairs: torch.Tensor
    """`[panels, K / 2, PANEL]` int32, each a pair of bf16."""
    handle: torch.Tensor
    """Their address, `[1]` int64."""


def pack(weights: Sequence[torch.Tensor]) -> Packed:
    """A packed copy of weights `[M, K]`, one behind the other."""
    panels = [-(-len(weight) // PANEL) for weight in weights]
    pairs = weights[0].new_empty(sum(panels), weights[0].shape[1] // 2, PANEL, dtype=torch.int32)
    for weight, room in zip(weights, pairs.split(panels), strict=True):
        full = F.pad(weight, (0, 0, 0, -len(weight) % PANEL)).contiguous().view(torch.int32)
        room.copy_(full.view(-1, PANEL, room.shape[1]).transpose(1, 2))
    return Packed(pairs, torch.tensor([pairs.data_ptr()]))


def unpack(packed: Packed, outputs: Sequence[int]) -> list[torch.Tensor]:
    """The weights `[M, K]` of a packed copy, M being each of `outputs`."""
    parts = packed.pairs.split([-(-count // PANEL) for count in outputs])
    full = [part.mT.contiguous().flatten(0, 1).view(torch.bfloat16) for part in parts]
    return [weight[:count].clone() for weight, count in zip(full, outputs, strict=True)]


def find_chunk(inputs: int, has_the_bits: Callable[[int], bool]) -> int | None:
    """The chunk by which products have the bits of oneDNN's, None if by none.

    Args:
        inputs: of the weight.
        has_the_bits: tries one.
    """
    # oneDNN's block is 1,024 inputs, or half of it for some sizes.
    return next(filter(has_the_bits, (1024, 512, inputs)), None)


def multiply(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    handle: torch.Tensor,
    outputs: Sequence[int],
    chunk: int,
) -> list[torch.Tensor]:
    """`[R, K]` to `[R, M]` for each weight; no gradient.

    Args:
        x: any number of rows.
        bias: `[sum of M]` or None.
        handle: of the packed weights.
        outputs: M of each.
        chunk: inputs whose products are added up before they join the sum, an even number.
    """
    out: list[torch.Tensor] = torch.ops.vllm_graft.packed_bf16(
        x.contiguous(), bias, handle, outputs, chunk
    )
    return out


def multiply_experts(
    x: torch.Tensor,
    counts: torch.Tensor,
    handle: torch.Tensor,
    outputs: Sequence[int],
    chunk: int,
) -> list[torch.Tensor]:
    """Rows of experts, each by the weights of its own; as `multiply` otherwise.

    Args:
        x: `[R, K]` sorted by expert.
        counts: `[experts]` int64: the rows of each.
        handle: of the packed weights of the first expert, then those of the second, and so on.
        outputs: M of each weight of one expert.
        chunk: as in `multiply`.
    """
    out: list[torch.Tensor] = torch.ops.vllm_graft.packed_bf16_experts(
        x.contiguous(), counts, handle, outputs, chunk
    )
    return out
