"""What a family plans for one attention block; applied once every layer has its plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from vllm_graft.attention.core import CoreAttention


@dataclass(frozen=True, kw_only=True)
class Swap:
    """A swap that is ready to be made, or was made before."""

    kind: str
    """`"inner_attention"` (the seam), `"block"` (old projections adopted) or `"mla"`."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    """Of the cached keys: for MLA the latent rank plus the rope dims, under one KV head."""
    replacement: nn.Module | None = None
    """The block to put in the old one's place; None to keep it."""
    apply: Callable[[], None] | None = None
    """A change inside the old block; None for none."""
    proven: bool = True
    """Whether the new attention needs no proof, or gave the old one's output in a trial."""

    @property
    def changes(self) -> bool:
        """Whether there is anything to do."""
        return self.replacement is not None or self.apply is not None


def swap_of(kind: str, core: CoreAttention, **rest: Any) -> Swap:
    """The swap that ends in `core`."""
    return Swap(
        kind=kind,
        num_heads=core.num_heads,
        num_kv_heads=core.num_kv_heads,
        head_dim=core.head_dim,
        **rest,
    )
