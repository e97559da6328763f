"""Checkpoint tensors that no model needs, and why."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vllm_graft.weights.fp8 import SUFFIX
from vllm_graft.weights.solve.line import Line

_TABLE = re.compile(r".*rotary_emb\.inv_freq")
_MASK = re.compile(r".*\.(?:attn|attention)\.(?:masked_)?bias")
_LAYER = re.compile(r"(.*\.layers\.)(\d+)\.")


def waived(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> list[Line]:
    """A line without a target for each of them."""
    lines = {name: _why(name, shape) for name, shape in shapes.items()}
    predictors = config.get("num_nextn_predict_layers") or 0
    last = config.get("num_hidden_layers") or 0
    for name in shapes:
        layer = _LAYER.match(name)
        # Only a layer that has what makes it one of multi-token prediction.
        if layer and predictors and int(layer[2]) >= last and f"{layer[0]}eh_proj.weight" in shapes:
            lines[f"{layer[0]}*"] = "multi-token prediction"
    return [Line(name, None, why) for name, why in lines.items() if why]


def _why(name: str, shape: tuple[int, ...]) -> str | None:
    if _TABLE.fullmatch(name):
        return "made from the config"
    return "causal mask" if _MASK.fullmatch(name) and len(shape) in (0, 4) else None


def needed(
    tensors: Mapping[str, tuple[tuple[int, ...], Any]], lines: list[Line]
) -> dict[str, tuple[int, ...]]:
    """The shapes of the others; a scale goes where its FP8 tensor goes."""
    away = tuple(str(line.source).removesuffix("*") for line in lines)
    return {
        name: shape
        for name, (shape, _) in tensors.items()
        if not (away and name.startswith(away))
        and not (name.endswith(SUFFIX) and name.removesuffix(SUFFIX) in tensors)
    }
