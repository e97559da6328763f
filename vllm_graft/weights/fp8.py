"""Block-quantized FP8 weights, as in DeepSeek V3's checkpoints.

`X` in float8_e4m3fn comes with `X_scale_inv` in float32, one scale per block of
128x128; blocks at the right and lower edges may be partial. The value is
`X * scale` ("inv" means that the scale is to be multiplied, not divided).
"""

from __future__ import annotations

import torch

from vllm_graft.weights.errors import WeightError
from vllm_graft.weights.shards import Region, select

BLOCK = 128
SUFFIX = "_scale_inv"
_ALL = (slice(None), slice(None))


def is_block_fp8(tensor: torch.Tensor) -> bool:
    """Whether a tensor needs a block scale before it means anything."""
    return tensor.dtype == torch.float8_e4m3fn


def check_scale(name: str, weight_OI: torch.Tensor, scale: torch.Tensor) -> None:
    """Raise if a weight and its scale are not a pair.

    Args:
        name: of the weight, for the error.
        weight_OI: `[O, I]` float8_e4m3fn.
        scale: `[ceil(O/128), ceil(I/128)]` float32.

    Raises:
        WeightError: a weight or scale of another shape or dtype, or a scale that is no number.
    """
    expected = tuple(-(-size // BLOCK) for size in weight_OI.shape)
    if weight_OI.dim() != 2 or tuple(scale.shape) != expected or scale.dtype != torch.float32:
        raise WeightError(
            f"FP8 tensor {name!r} {tuple(weight_OI.shape)}: its scale {name + SUFFIX!r} is "
            f"{tuple(scale.shape)} {scale.dtype}; expected {expected} torch.float32, one per "
            f"block of {BLOCK}x{BLOCK} of a matrix"
        )
    if not bool(scale.isfinite().all()):
        raise WeightError(f"FP8 tensor {name!r}: its scale {name + SUFFIX!r} has NaN or infinity")


def dequantize(
    weight_OI: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, region: Region = _ALL
) -> torch.Tensor:
    """`weight_OI * scale`, each scale spread over its block, in float32 and then `dtype`.

    Args:
        weight_OI: `[O, I]` float8_e4m3fn.
        scale: `[ceil(O/128), ceil(I/128)]` float32.
        dtype: of the result.
        region: which rows and columns are wanted, in any order; nothing else is read.
    """
    rows, columns = (
        torch.arange(size, device=weight_OI.device)[index]
        for size, index in zip(weight_OI.shape, region, strict=True)
    )
    out = torch.empty(len(rows), len(columns), dtype=dtype, device=weight_OI.device)
    spread = scale[:, columns // BLOCK]
    # One strip of rows at a time: float32 of the whole matrix would be 4 times its size.
    for first in range(0, len(rows), BLOCK):
        strip = rows[first : first + BLOCK]
        values = select(weight_OI, (strip, region[1]))
        out[first : first + BLOCK] = values.float() * spread[strip // BLOCK]
    return out


class Halves:
    """FP8 weights that wait for their scale, and scales that wait for their weight."""

    def __init__(self) -> None:
        self._weights: dict[str, torch.Tensor] = {}
        self._scales: dict[str, torch.Tensor] = {}

    def add(
        self, name: str, tensor: torch.Tensor, *, is_scale: bool
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`(weight, scale)` if the other half is here already, else None and keep this one.

        Args:
            name: of the weight, for both halves.

        Raises:
            WeightError: the same half a second time.
        """
        mine, other = self._weights, self._scales
        if is_scale:
            mine, other = other, mine
        if name in mine:
            raise WeightError(f"checkpoint tensor {name + SUFFIX * is_scale!r} came twice")
        if name not in other:
            mine[name] = tensor
            return None
        found = other.pop(name)
        return (found, tensor) if is_scale else (tensor, found)

    def unpaired(self) -> list[str]:
        """One error line for each half that is left."""
        return [
            f"FP8 tensor {name!r} {tuple(weight.shape)}: its scale {name + SUFFIX!r} did not come"
            for name, weight in self._weights.items()
        ] + [
            f"scale {name + SUFFIX!r} {tuple(scale.shape)}: no FP8 tensor {name!r} came for it"
            for name, scale in self._scales.items()
        ]
