"""Binding: one paged vLLM layer for every `CoreAttention` of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vllm_graft.attention.core import CoreAttention
from vllm_graft.serve import _vllm


class PagedAttention:
    """A vLLM attention layer as `CoreAttention` calls it.

    Not an `nn.Module`: assigned to a `CoreAttention` it must not enter the
    user's module tree. The adapter registers `layer` in its own.
    """

    def __init__(self, layer: nn.Module, name: str) -> None:
        self.layer = layer
        self.name = name
        self.calls = 0
        self.rehearsing = False
        """In the dry run: give every token a result of its own q, k and v, without a cache."""

    def active(self) -> bool:
        """Whether vLLM is running a forward at this moment."""
        return self.rehearsing or _vllm.forward_running()

    def __call__(
        self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor
    ) -> torch.Tensor:
        """Cache k and v, attend to the cache; returns `[T, N, H]`.

        Raises:
            RuntimeError: the module already ran in this forward: one cache
                cannot hold the keys of two uses.
        """
        if not torch.compiler.is_compiling():
            self._count_call()
        if self.rehearsing:
            return q_TNH + (k_TKH + v_TKH).repeat_interleave(q_TNH.shape[1] // k_TKH.shape[1], 1)
        flat = (x.flatten(1).contiguous() for x in (q_TNH, k_TKH, v_TKH))
        out: torch.Tensor = self.layer(*flat)
        return out.view(q_TNH.shape)

    def _count_call(self) -> None:
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError(
                f"{self.name}: this attention ran twice in one forward. Each use needs a KV "
                "cache of its own: build one attention module per use (their projections may "
                "share weights)"
            )


def cache_names(names: list[str]) -> list[str]:
    """KV-cache layer names from qualified module names.

    vLLM reads the layer index from the name and wants exactly one integer in
    it. Where a name has none or several, all keep their words, joined, and get
    their ordinal among the model's attention layers.

    >>> cache_names(["layers.0.attention", "layers.1.attention"])
    ['layers.0.attention', 'layers.1.attention']
    >>> cache_names(["block_a.attn", "blocks.0.1.attn"])
    ['kv_block_a_attn.0', 'kv_blocks_0_1_attn.1']
    """
    if all(sum(part.isdigit() for part in name.split(".")) == 1 for name in names):
        return names
    return [f"kv_{name.replace('.', '_')}.{ordinal}" for ordinal, name in enumerate(names)]


def bind(
    model: nn.Module, vllm_config: Any, prefix: str, on_weights_ready: Callable[[], None]
) -> list[PagedAttention]:
    """Give every `CoreAttention` in `model` its paged layer.

    Args:
        model: a model built by a factory, on its real dtype.
        vllm_config: the engine's configuration, current in vLLM.
        prefix: of this model's names inside vLLM.
        on_weights_ready: called when the last layer hears that loading is complete.

    Returns:
        One entry per layer, in the model's order.

    Raises:
        ValueError: no attention found, or attention that vLLM cannot cache.
    """
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, CoreAttention)]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no CoreAttention, so vLLM has no KV cache to serve it "
            "from; call replace_with_trainable_attention(model) in the factory, or build the "
            "model with TrainableFlashAttention"
        )
    layers: list[PagedAttention] = []
    names = cache_names([f"{prefix}.{n}" if prefix else n for n, _ in found])
    for (qualified, core), name in zip(found, names, strict=True):
        if not core.spec.causal:
            raise ValueError(f"{qualified}: causal=False cannot be served from a KV cache")
        ready = on_weights_ready if name == names[-1] else _nothing
        layers.append(PagedAttention(_paged(core, name, vllm_config, ready), qualified))
        core.bind(layers[-1])
    return layers


def _nothing() -> None:
    """The completion call of all layers but the last."""


def _paged(
    core: CoreAttention, name: str, vllm_config: Any, on_weights_ready: Callable[[], None]
) -> nn.Module:
    return _vllm.paged_attention_layer(
        num_heads=core.num_heads,
        num_kv_heads=core.num_kv_heads,
        head_size=core.head_dim,
        scale=core.spec.scale,
        sliding_window=core.spec.sliding_window,
        prefix=name,
        vllm_config=vllm_config,
        on_weights_ready=on_weights_ready,
    )
