"""`replace_with_trainable_attention`: find each layer's attention and take its seam."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from vllm_graft.attention.core import CoreAttention
from vllm_graft.families import plain, torchtitan
from vllm_graft.precision import keep_table_precision

_ATTENTION_NAMES = ("attention", "self_attn", "self_attention", "attn")
_LAYER_COUNTS = ("num_hidden_layers", "n_layers", "num_layers", "n_layer")

FAMILIES = (torchtitan, plain)
"""Tried in order. Each has `matches(attention)` and `swap(attention) -> (module, kind)`."""


@dataclass(frozen=True, kw_only=True)
class LayerSwap:
    """One layer's attention after the swap."""

    name: str
    kind: str
    """`"inner_attention"` (the seam) or `"block"` (old projections adopted)."""
    num_heads: int
    num_kv_heads: int
    head_dim: int


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

    Parameter names stay as they were. TorchTitan models keep their own
    projections, norms and RoPE (only `inner_attention` changes); blocks with
    `wq`, `wk`, `wv`, `wo` are swapped whole and keep those modules. RoPE tables
    and router biases keep their precision through a later `.to(dtype)`. A
    second call changes nothing.

    Args:
        model: has `layers`, a ModuleDict, ModuleList, list or dict.
        use_mla: whether the model has latent (MLA) attention.

    Returns:
        The layers by name, with their kind and head counts.

    Raises:
        AttributeError: the model has no `layers`.
        ValueError: no layer at all, a layer without attention, attention that
            cannot be swapped faithfully, a count that disagrees with the
            model's config, or the wrong `use_mla`.
    """
    before = set(model.state_dict())
    found = [_swap_layer(name, layer, use_mla) for name, layer in _layers(model)]
    if not found:
        raise ValueError(f"{type(model).__name__}.layers is empty: no attention was swapped")
    _check_count(model, len(found))
    changed = before ^ set(model.state_dict())
    if changed:
        raise ValueError(f"the swap would change the parameter names {sorted(changed)}")
    keep_table_precision(model, torchtitan.rope_tables(model))
    return SwapReport(
        layers=tuple(swap for swap, _ in found), swapped=sum(changed for _, changed in found)
    )


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    layers: Any = getattr(model, "layers", None)
    if layers is None:
        children = ", ".join(name for name, _ in model.named_children()) or "none"
        raise AttributeError(
            f"{type(model).__name__} has no `layers` (its children: {children}); pass the module "
            "that holds the decoder layers"
        )
    pairs = layers.items() if hasattr(layers, "items") else enumerate(layers)
    return ((f"layers.{key}", layer) for key, layer in pairs)


def _swap_layer(name: str, layer: nn.Module, use_mla: bool) -> tuple[LayerSwap, bool]:
    slot = next(
        (s for s in _ATTENTION_NAMES if isinstance(getattr(layer, s, None), nn.Module)), None
    )
    if slot is None:
        children = ", ".join(child for child, _ in layer.named_children()) or "none"
        raise ValueError(
            f"{name}: no attention found (looked for {_ATTENTION_NAMES}, got {children})"
        )
    attention = getattr(layer, slot)
    where = f"{name}.{slot}"
    _check_mla(where, attention, use_mla)
    family = next((f for f in FAMILIES if f.matches(attention)), None)
    if family is None:
        children = ", ".join(child for child, _ in attention.named_children()) or "none"
        raise ValueError(
            f"{where}: {type(attention).__name__} has neither the seam `inner_attention` nor the "
            f"projections wq, wk, wv, wo (its children: {children})"
        )
    try:
        new, core, kind = family.swap(attention)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    changed = new is not None
    if new is not None and new is not attention:
        setattr(layer, slot, new)
    return _describe(where, kind, core), changed


def _describe(where: str, kind: str, core: CoreAttention) -> LayerSwap:
    return LayerSwap(
        name=where,
        kind=kind,
        num_heads=core.num_heads,
        num_kv_heads=core.num_kv_heads,
        head_dim=core.head_dim,
    )


def _check_mla(where: str, attention: nn.Module, use_mla: bool) -> None:
    has_mla = hasattr(attention, "wkv_a")
    if use_mla and not has_mla:
        raise ValueError(
            f"{where}: use_mla=True, but {type(attention).__name__} has no latent "
            "projection wkv_a; call with use_mla=False"
        )
    if has_mla and not use_mla:
        raise ValueError(
            f"{where}: {type(attention).__name__} is latent attention (it has wkv_a); "
            "call with use_mla=True"
        )
    if has_mla:
        raise ValueError(
            f"{where}: swapping latent attention is not in this release; "
            "TrainableMLA can be built by hand and trained"
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
