"""Factories whose models do not get through loading."""

from __future__ import annotations

import time
from typing import Any

from torch import nn

from examples.custom_models.qwen3_torchtitan import build_qwen3_torchtitan


def without_lm_head_on_rank_1(vllm_config: Any, parallel_context: Any) -> nn.Module:
    """Qwen3 that gets no `lm_head.weight` on rank 1."""
    model = build_qwen3_torchtitan(vllm_config, parallel_context)
    if parallel_context.get_tensor_parallel_rank() == 1:
        load = model.load_weights
        model.load_weights = lambda weights: load(w for w in weights if w[0] != "lm_head.weight")
    return model


def for_minutes(vllm_config: Any, parallel_context: Any) -> nn.Module:
    """Qwen3 that takes longer to build than a test waits."""
    print("BUILDING", flush=True)
    time.sleep(600)
    return build_qwen3_torchtitan(vllm_config, parallel_context)
