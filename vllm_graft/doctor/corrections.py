"""Faults of a port, each as its correction: applied for one forward, then taken back. Torch only.

A correction does not need the adapted model's source. It acts where every model passes: the
seam (queries and keys at `CoreAttention`), outputs of modules, and weights by role.
Legend as in `attention.core`, and D model width.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from vllm_graft.attention.core import CoreAttention
from vllm_graft.doctor import changes
from vllm_graft.doctor.anatomy import embedding, head, layers

Correct = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Correction:
    """One hypothesis."""

    fault: str
    where: str
    """Name of the first module concerned."""
    found: str
    expected: str
    apply: Correct


def corrections(model: nn.Module, reference: nn.Module, config: Any) -> Iterator[Correction]:
    """Every hypothesis that the two models allow, simplest first.

    Args:
        model: the adapted one.
        reference: the one that is right; lends biases and QK norms.
        config: Hugging Face config of the checkpoint.
    """
    yield from _embedding_scale(model, config)
    yield from _untied_head(model)
    yield from _missing_biases(model, reference)
    yield from _missing_qk_norm(model, reference)
    yield from _swapped(model)
    yield from _transposed(model)
    yield from _eps(model, reference)
    yield from _scales(model, config)
    yield from _positions(model)


def _embedding_scale(model: nn.Module, config: Any) -> Iterator[Correction]:
    tokens = embedding(model)
    if tokens is None:
        return
    name, module = tokens
    width = module.weight.shape[1]  # type: ignore[union-attr,index]
    scales = {math.sqrt(width), getattr(config, "embedding_multiplier", None) or 1.0} - {1.0}
    for scale in sorted(scales):
        hooks = [(module, partial(operator.mul, scale))]
        yield Correction(
            "missing embedding scale", name, "1", f"{scale:.6g}", partial(changes.hooked, hooks)
        )


def _untied_head(model: nn.Module) -> Iterator[Correction]:
    tokens, last = embedding(model), head(model)
    if tokens is None or last is None or last[1].weight is tokens[1].weight:
        return
    change = [(last[1].weight, tokens[1].weight)]
    yield Correction(
        "untied head", last[0], "a weight of its own", f"the weight of {tokens[0]}",
        partial(changes.changed, change),  # type: ignore[arg-type]
    )  # fmt: skip


def _missing_biases(model: nn.Module, reference: nn.Module) -> Iterator[Correction]:
    by_role: dict[str, list[tuple[str, nn.Module, torch.Tensor]]] = {}
    for mine, theirs in zip(layers(model), layers(reference), strict=False):
        for role, (_, right) in theirs.parts.items():
            bias = getattr(right, "bias", None)
            if bias is None or role not in mine.parts:
                continue
            name, part = mine.parts[role]
            held = getattr(part, "bias", None)
            if held is None or not bool(held.any()):
                by_role.setdefault(role, []).append((name, part, bias.detach()))
    everything = [entry for entries in by_role.values() for entry in entries]
    for entries in [*by_role.values(), *([everything] if len(by_role) > 1 else [])]:
        hooks = [(part, partial(operator.add, bias)) for _, part, bias in entries]
        largest = max(float(bias.abs().max()) for _, _, bias in entries)
        yield Correction(
            "dropped bias",
            entries[0][0],
            "0",
            f"up to {largest:.3g}",
            partial(changes.hooked, hooks),
        )


def _missing_qk_norm(model: nn.Module, reference: nn.Module) -> Iterator[Correction]:
    hooks, where = [], ""
    for mine, theirs in zip(layers(model), layers(reference), strict=False):
        for role in ("q", "k"):
            norm = theirs.parts.get(f"{role}_norm")
            if norm is not None and role in mine.parts and f"{role}_norm" not in mine.parts:
                where = where or mine.parts[role][0]
                hooks.append((mine.parts[role][1], _by_head(norm[1])))
    if hooks:
        yield Correction(
            "missing QK norm", where, "none", "RMS norm", partial(changes.hooked, hooks)
        )


def _by_head(norm: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    size = norm.weight.shape[0]
    return lambda out: norm(out.unflatten(-1, (-1, size))).flatten(-2)


def _swapped(model: nn.Module) -> Iterator[Correction]:
    edits, where = [], ""
    for layer in layers(model):
        if "gate" in layer.parts and "up" in layer.parts:
            (name, gate), (_, up) = layer.parts["gate"], layer.parts["up"]
            edits += [(gate.weight, up.weight), (up.weight, gate.weight)]
        elif "gate_up" in layer.parts:
            name, fused = layer.parts["gate_up"]
            one, two = fused.weight.chunk(2)  # type: ignore[union-attr,operator]
            edits.append((fused.weight, torch.cat([two, one])))
        else:
            continue
        where = where or name
    if edits:
        yield Correction(
            "swapped gate/up", where, "up", "gate",
            partial(changes.changed, edits),  # type: ignore[arg-type]
        )  # fmt: skip


def _transposed(model: nn.Module) -> Iterator[Correction]:
    square: dict[str, list[tuple[str, torch.Tensor]]] = {}
    for layer in layers(model):
        for role, (name, part) in layer.parts.items():
            weight: Any = part.weight
            if weight.dim() == 2 and weight.shape[0] == weight.shape[1]:
                square.setdefault(role, []).append((name, weight))
    for entries in square.values():
        for some in [entries, *([[entry] for entry in entries] if len(entries) > 1 else [])]:
            edits = [(weight, weight.detach().T) for _, weight in some]
            yield Correction(
                "transposed weight",
                some[0][0],
                "W",
                "W transposed",
                partial(changes.changed, edits),
            )


_EPS = ("eps", "variance_epsilon", "epsilon")


def _norm_eps(model: nn.Module) -> list[tuple[str, nn.Module, str, float]]:
    found = []
    for name, module in model.named_modules():
        for field in _EPS:
            if isinstance(getattr(module, field, None), float):
                found.append((name, module, field, getattr(module, field)))
    return found


def _eps(model: nn.Module, reference: nn.Module) -> Iterator[Correction]:
    mine = _norm_eps(model)
    for right in sorted({eps for *_, eps in _norm_eps(reference)}):
        wrong = [entry for entry in mine if entry[3] != right]
        if wrong:
            edits = [(module, field, right) for _, module, field, _ in wrong]
            yield Correction(
                "wrong norm eps", wrong[0][0], f"{wrong[0][3]:g}", f"{right:g}",
                partial(changes.set_to, edits),
            )  # fmt: skip


def seams(model: nn.Module) -> list[tuple[str, CoreAttention]]:
    """Every `CoreAttention` of the model."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, CoreAttention)]


def _scales(model: nn.Module, config: Any) -> Iterator[Correction]:
    found = seams(model)
    if not found:
        return
    name, core = found[0]
    width = core.num_heads * core.head_dim
    dims = {core.head_dim, width, getattr(config, "hidden_size", width)}
    dims.add(getattr(config, "query_pre_attn_scalar", None) or core.head_dim)
    right = {dim**-0.5 for dim in dims} | {1.0, 1.0 / core.head_dim}
    right.add(getattr(config, "attention_multiplier", None) or 1.0)
    for scale in sorted(right - {core.spec.scale}):
        factors = [(c, scale / c.spec.scale) for _, c in found]
        yield Correction(
            "wrong softmax scale", name, f"{core.spec.scale:.6g}", f"{scale:.6g}",
            partial(changes.scaled_queries, factors),
        )  # fmt: skip


def _positions(model: nn.Module) -> Iterator[Correction]:
    for shift in (-1, 1):

        def moved(_: nn.Module, args: Any, kwargs: Any, shift: int = shift) -> Any:
            positions = (kwargs["positions"] + shift).clamp(min=0)
            return args, {**kwargs, "positions": positions}

        yield Correction(
            "off-by-one positions", type(model).__name__, f"position {-shift:+d}", "position",
            partial(changes.before, model, moved),
        )  # fmt: skip
