"""TorchTitan 0.3: attention with the seam `inner_attention`.

Imports nothing of TorchTitan at module level. Legend as in `attention.core`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from vllm_graft.attention.core import CoreAttention
from vllm_graft.families.swap import Swap, swap_of
from vllm_graft.order import ORDER
from vllm_graft.positions import current_batch

KIND = "inner_attention"


class TitanCoreAttention(CoreAttention):
    """`CoreAttention` with the call signature of TorchTitan's inner attention."""

    def forward(  # type: ignore[override]
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        attention_masks: Any = None,
        scale: float | None = None,
        enable_gqa: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attend; `attention_masks` may be None or TorchTitan's `VarlenMetadata`."""
        if scale is not None and scale != self.spec.scale:
            raise ValueError(f"called with scale={scale}, but built with scale={self.spec.scale}")
        if kwargs.get("out_transform") is not None:
            raise ValueError("out_transform (attention epilogues) is not supported")
        return super().forward(q, k, v, cu_seqlens=borders_of(attention_masks))


def borders_of(attention_masks: Any) -> torch.Tensor | None:
    """The sample borders in TorchTitan's masks argument, None for none.

    Raises:
        ValueError: masks of another kind.
    """
    if attention_masks is None:
        return None
    borders: torch.Tensor | None = getattr(attention_masks, "cu_seq_q", None)
    if borders is None:
        raise ValueError(
            f"attention_masks of type {type(attention_masks).__name__} are not supported: pass "
            "None (every row is one sample), VarlenMetadata, or run inside vllm_graft.packed(...)"
        )
    return borders


def matches(attention: nn.Module) -> bool:
    """Whether this is a TorchTitan 0.3 attention block."""
    return hasattr(attention, "inner_attention") and hasattr(attention, "qkv_linear")


def plan(attention: Any) -> Swap:
    """Build what takes the seam, without touching the block.

    Raises:
        ValueError: a window that is not causal.
    """
    if isinstance(attention.inner_attention, CoreAttention):
        return swap_of(KIND, attention.inner_attention)
    refuse_parallelized(attention)
    core = TitanCoreAttention(
        attention.n_heads,
        attention.n_kv_heads,
        attention.head_dim,
        scale=attention.scaling,
        sliding_window=_window(attention.inner_attention),
    )
    return swap_of(KIND, core, apply=partial(_take_seam, attention, core))


def refuse_parallelized(attention: Any) -> None:
    """Refuse a block that TorchTitan has sharded already: its head counts are the whole model's.

    Raises:
        ValueError: tensor parallelism came before attention replacement.
    """
    if getattr(attention, "_parallelized", False):
        raise ValueError(
            f"{type(attention).__name__} was parallelized before its attention was replaced; "
            f"{ORDER}"
        )


def _take_seam(attention: Any, core: CoreAttention) -> None:
    attention.inner_attention = core
    if hasattr(attention, "rope"):
        attention.rope.register_forward_pre_hook(_fill_positions, with_kwargs=True)


def _window(inner_attention: Any) -> int | None:
    left, right = getattr(inner_attention, "window_size", (-1, 0))
    if right != 0:
        raise ValueError(f"window_size=({left}, {right}) is not causal")
    # TorchTitan counts the keys before the query, vLLM and Hugging Face the query too.
    return None if left < 0 else left + 1


def _fill_positions(rope: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Give RoPE the running batch's positions where the model passes none."""
    batch = current_batch()
    query = args[0]
    given = args[2] if len(args) > 2 else kwargs.get("positions")
    if batch is None or given is not None:
        return None
    positions = batch.positions.to(query.device).view(query.shape[:2])
    rest = {name: value for name, value in kwargs.items() if name != "positions"}
    return (*args[:2], positions), rest


def rope_tables(model: nn.Module) -> dict[nn.Module, set[str]]:
    """The cache buffers of TorchTitan's RoPE modules, which a cast would ruin."""
    return {
        module: {"cache"}
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] == "rope" and "cache" in module._buffers
    }
