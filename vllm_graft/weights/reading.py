"""Taking out of a checkpoint tensor what a rank keeps, and only that.

Checkpoint tensors are usually mapped files (safetensors, and so vLLM's default loader),
of which nothing is read until it is used: so cut first, then reorder, dequantize and copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_graft.weights.fp8 import dequantize
from vllm_graft.weights.mapped import announce
from vllm_graft.weights.rows import RowOrder
from vllm_graft.weights.shards import Region, select


@dataclass(frozen=True)
class Reading:
    """What a checkpoint tensor needs before it is a parameter's values."""

    order: RowOrder | None = None
    """Its rows come in another order."""
    scale: torch.Tensor | None = None
    """It is block FP8 with these scales, checked by `check_scale`."""
    mapped: bool = False
    """It lies in a mapped file, which has to be told what will be read of it."""

    def take(self, tensor: torch.Tensor, region: Region, dtype: torch.dtype) -> torch.Tensor:
        """The values in `region`, a view of `tensor` where they need nothing.

        Args:
            tensor: `[...]`, from the checkpoint.
            region: an index for each dimension, of the values as the parameter has them.
            dtype: of dequantized values.
        """
        if self.order is not None:
            region = (self.order.indices[region[0]], *region[1:])
        if self.mapped:
            announce(tensor, region)
        if self.scale is not None:
            return dequantize(tensor, self.scale, dtype, region)
        return select(tensor, region)

    def whole(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """All values."""
        return self.take(tensor, (slice(None),) * tensor.dim(), dtype)


AS_IT_IS = Reading()
