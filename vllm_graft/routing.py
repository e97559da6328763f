"""Which experts a mixture-of-experts model chose, recorded while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vllm_graft.families.torchtitan_moe import routers


@contextmanager
def record_routing(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Record the experts that every router of `model` chooses in the block.

    Works in training and in an eager engine in this process; a compiled graph
    runs no hooks, which is an error at the end of the block.

    Args:
        model: with TorchTitan's routers, such as an engine's live module.

    Yields:
        A dict that holds `{router name: [T, K] int64}` once the block has
        ended: one row per token, in the order in which they ran.

    Raises:
        ValueError: `model` has no router, or one that never ran in the block.
    """
    found = routers(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no mixture-of-experts router to record")
    chosen: dict[str, list[torch.Tensor]] = {name: [] for name in found}
    handles = [
        router.register_forward_hook(_recorder(chosen[name])) for name, router in found.items()
    ]
    recorded: dict[str, torch.Tensor] = {}
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
    idle = [name for name, rows in chosen.items() if not rows]
    if idle:
        raise ValueError(
            f"no call was seen of the routers {', '.join(idle)}: run the model inside the block, "
            "and an engine with enforce_eager=True"
        )
    recorded |= {name: torch.cat(rows) for name, rows in chosen.items()}


def _recorder(rows: list[torch.Tensor]) -> Any:
    def record(router: nn.Module, args: Any, output: tuple[torch.Tensor, ...]) -> None:
        recomputed = torch._C._current_graph_task_id() != -1  # activation checkpointing
        if not recomputed:
            rows.append(output[1].detach().flatten(0, -2).cpu().clone())

    return record
