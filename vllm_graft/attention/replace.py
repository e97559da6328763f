"""`replace_with_trainable_attention`: find each layer's attention and take its seam."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from vllm_graft.families import (
    megatron,
    megatron_mla,
    plain,
    torchtitan,
    torchtitan_mla,
    torchtitan_moe,
)
from vllm_graft.families.swap import Swap
from vllm_graft.precision import keep_table_precision
from vllm_graft.stage import OtherStage

logger = logging.getLogger("vllm_graft")

_ATTENTION_NAMES = ("attention", "self_attn", "self_attention", "attn")
_LAYER_COUNTS = ("num_hidden_layers", "n_layers", "num_layers", "n_layer")

FAMILIES = (megatron_mla, torchtitan_mla, torchtitan, megatron, plain)
"""Tried in order. Each has `matches(attention) -> bool` and `plan(attention) -> Swap`."""


@dataclass(frozen=True, kw_only=True)
class LayerSwap:
    """One layer's attention after the swap."""

    name: str
    kind: str
    """`"inner_attention"` or `"core_attention"` (the seam of TorchTitan or Megatron), `"block"`
    (old projections adopted) or `"mla"` (latent)."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    """Of the cached keys: for MLA the latent rank plus the rope dims, under one KV head."""
    proven: bool
    """False where a swapped block could not be tried out against the old one."""


@dataclass(frozen=True, kw_only=True)
class SwapReport:
    """What `replace_with_trainable_attention` found and changed."""

    layers: tuple[LayerSwap, ...]
    swapped: int
    """How many of them this call changed; 0 when it was called before."""

    def __str__(self) -> str:
        kinds = sorted({(s.kind, s.num_heads, s.num_kv_heads, s.head_dim) for s in self.layers})
        shapes = ", ".join(f"{k} {n} heads, {kv} KV heads, head_dim {h}" for k, n, kv, h in kinds)
        return f"{self.swapped} of {len(self.layers)} attention layers swapped ({shapes})"


def replace_with_trainable_attention(model: nn.Module, use_mla: bool = False) -> SwapReport:
    """Swap the attention of every layer for one that vLLM serves and autograd trains.

    Parameter names stay as they were. TorchTitan and Megatron models keep their own
    projections, norms and RoPE tables (only `inner_attention` or `core_attention` changes,
    or for latent attention the block's forward, see `TrainableMLA`); blocks with `wq`, `wk`,
    `wv`, `wo` are swapped whole and keep those modules. RoPE tables
    and router biases keep their precision through a later `.to(dtype)`. A
    second call changes nothing, and neither does a call that raises.

    Args:
        model: has `layers`, a ModuleDict, ModuleList, list or dict; or Megatron's
            `GPTModel`, whose `decoder` has them.
        use_mla: whether the model has latent (MLA) attention.

    Returns:
        The layers by name, with their kind and head counts. A swapped block was
        tried out against the old one on random tokens; `proven` says where that
        was not possible.

    Raises:
        AttributeError: the model has no `layers`.
        ValueError: no layer at all, a layer without attention, attention that
            cannot be swapped faithfully, a count that disagrees with the
            model's config, or the wrong `use_mla`.
    """
    layers = list(_layers(model))
    planned = [
        _Planned.of(name, layer, use_mla)
        for name, layer in layers
        if not isinstance(layer, OtherStage)
    ]
    if not planned:
        raise ValueError(f"{type(model).__name__}.layers holds no layer: no attention was swapped")
    _check_count(model, len(layers))
    megatron.check(model)
    # Nothing was touched so far: a refusal leaves the model as it was.
    for entry in planned:
        entry.apply()
    torchtitan_moe.correct_feed_forward(model)
    megatron.adopt(model)
    keep_table_precision(model, torchtitan.rope_tables(model))
    return SwapReport(
        layers=tuple(entry.describe() for entry in planned),
        swapped=sum(entry.swap.changes for entry in planned),
    )


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    layers: Any = getattr(model, "layers", None)
    if layers is None and hasattr(getattr(model, "decoder", None), "layers"):
        found = _layers(model.decoder)  # type: ignore[arg-type]
        return ((f"decoder.{name}", layer) for name, layer in found)
    if layers is None:
        raise AttributeError(
            f"{type(model).__name__} has no `layers` (its children: {_children(model)}); pass the "
            "module that holds the decoder layers"
        )
    pairs = layers.items() if hasattr(layers, "items") else enumerate(layers)
    return ((f"layers.{key}", layer) for key, layer in pairs)


@dataclass(frozen=True)
class _Planned:
    """The swap of one layer, and where its attention sits."""

    layer: nn.Module
    slot: str
    where: str
    swap: Swap

    @classmethod
    def of(cls, name: str, layer: nn.Module, use_mla: bool) -> _Planned:
        slot = _slot(name, layer)
        where, attention = f"{name}.{slot}", getattr(layer, slot)
        _check_mla(where, attention, use_mla)
        family = next((f for f in FAMILIES if f.matches(attention)), None)
        if family is None:
            raise ValueError(
                f"{where}: {type(attention).__name__} has neither a seam (`inner_attention`, "
                "`core_attention`) nor the projections wq, wk, wv, wo (its children: "
                f"{_children(attention)})"
            )
        try:
            swap = family.plan(attention)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if not swap.proven:
            logger.warning("%s: the swapped block could not be tried out against the old", where)
        return cls(layer, slot, where, swap)

    def apply(self) -> None:
        if self.swap.replacement is not None:
            setattr(self.layer, self.slot, self.swap.replacement)
        if self.swap.apply is not None:
            self.swap.apply()

    def describe(self) -> LayerSwap:
        return LayerSwap(
            name=self.where,
            kind=self.swap.kind,
            num_heads=self.swap.num_heads,
            num_kv_heads=self.swap.num_kv_heads,
            head_dim=self.swap.head_dim,
            proven=self.swap.proven,
        )


def _slot(name: str, layer: nn.Module) -> str:
    for slot in _ATTENTION_NAMES:
        if isinstance(getattr(layer, slot, None), nn.Module):
            return slot
    raise ValueError(
        f"{name}: no attention found (looked for {', '.join(_ATTENTION_NAMES)}; "
        f"its children: {_children(layer)})"
    )


def _children(module: nn.Module) -> str:
    return ", ".join(name for name, _ in module.named_children()) or "none"


def _check_mla(where: str, attention: nn.Module, use_mla: bool) -> None:
    has_mla = hasattr(attention, "wkv_a") or megatron_mla.matches(attention)
    if use_mla and not has_mla:
        raise ValueError(
            f"{where}: use_mla=True, but {type(attention).__name__} has no latent "
            "projection (wkv_a, linear_kv_down_proj); call with use_mla=False"
        )
    if has_mla and not use_mla:
        raise ValueError(
            f"{where}: {type(attention).__name__} is latent attention (its children: "
            f"{_children(attention)}); "
            "call with use_mla=True"
        )


def _check_count(model: nn.Module, found: int) -> None:
    for holder in ("config", "params", "args", "model_args"):
        config = getattr(model, holder, None)
        for field in _LAYER_COUNTS:
            expected = getattr(config, field, None)
            if isinstance(expected, int) and expected != found:
                raise ValueError(
                    f"{found} attention layers found, but {holder}.{field} says {expected}"
                )
