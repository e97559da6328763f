"""Binding: one paged vLLM layer for every `CoreAttention` and `TrainableMLA` of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vllm_graft.attention.core import CoreAttention
from vllm_graft.attention.mla import TrainableMLA
from vllm_graft.exact import is_recorded
from vllm_graft.order import ORDER
from vllm_graft.products import Group
from vllm_graft.serve import _vllm, _vllm_mla


class PagedAttention:
    """A vLLM attention layer as `CoreAttention` calls it.

    Not an `nn.Module`: assigned to a `CoreAttention` it must not enter the
    user's module tree. The adapter registers `layer` in its own.
    """

    def __init__(self, layer: nn.Module, name: str) -> None:
        self.layer = layer
        self.name = name
        self.calls = 0
        self._forward_running = _vllm.forward_running()
        self.rehearsing = False
        """In the dry run: give every token a result of its own q, k and v, without a cache."""

    def active(self) -> bool:
        """Whether vLLM is running a forward at this moment."""
        return self.rehearsing or self._forward_running()

    def __call__(
        self,
        q_TNH: torch.Tensor,
        k_TKH: torch.Tensor,
        v_TKH: torch.Tensor,
        sinks_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Cache k and v, attend to the cache; returns `[T, N, H]`.

        Raises:
            RuntimeError: the module already ran in this forward: one cache
                cannot hold the keys of two uses.
        """
        self._count_call()
        if self.rehearsing:
            return q_TNH + (k_TKH + v_TKH).repeat_interleave(q_TNH.shape[1] // k_TKH.shape[1], 1)
        if sinks_N is not None and is_recorded():
            raise NotImplementedError(f"{self.name}: sinks, which a layer holds, in a recording")
        if sinks_N is not None:
            _vllm.set_sinks(self.layer, sinks_N)
        out: torch.Tensor = self.layer(*map(_rows, (q_TNH, k_TKH, v_TKH)))
        return out.view(q_TNH.shape)

    def pack(self) -> Group | None:
        """Multiply inside attention by packed weights from now on; None where nothing is."""
        return None

    def _count_call(self) -> None:
        if torch.compiler.is_compiling():
            return
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError(
                f"{self.name}: this attention ran twice in one forward. Each use needs a KV "
                "cache of its own: build one attention module per use (their projections may "
                "share weights)"
            )


def _rows(x_TNH: torch.Tensor) -> torch.Tensor:
    """`[T, N * H]`, each row in one piece; a part of a joined product is not copied."""
    rows = x_TNH.flatten(1)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


class PagedLatent(PagedAttention):
    """A vLLM MLA layer as `TrainableMLA` calls it."""

    def __call__(  # type: ignore[override]
        self, q_TNH: torch.Tensor, kv_c_TR: torch.Tensor, k_pe_TP: torch.Tensor
    ) -> torch.Tensor:
        """Cache the latent vectors and rotated keys, attend to the cache; `[T, N, V]`.

        Raises:
            RuntimeError: the module already ran in this forward.
        """
        self._count_call()
        shape = (*q_TNH.shape[:2], self.layer.v_head_dim)
        if self.rehearsing:
            own = q_TNH.sum(-1) + (kv_c_TR.sum(-1) + k_pe_TP.sum(-1))[:, None]
            return own[..., None].expand(shape)
        out: torch.Tensor = self.layer(
            q_TNH.contiguous(),
            kv_c_TR.contiguous(),
            k_pe_TP.unsqueeze(1).contiguous(),
            output_shape=(shape[0], shape[1] * shape[2]),
        )
        return out.view(shape)

    def pack(self) -> Group | None:
        """Serve by packed heads of `wkv_b`; None where there are none."""
        kv_b: Any = self.layer.kv_b_proj
        packed: Group | None = kv_b.pack()
        return packed


def new_forward(layers: list[PagedAttention]) -> None:
    """Each layer may run once from here."""
    for layer in layers:
        layer.calls = 0


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
    """Give every `CoreAttention` and `TrainableMLA` in `model` its paged layer.

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
    kinds = (CoreAttention, TrainableMLA)
    found: list[tuple[str, Any]] = [
        (name, module) for name, module in model.named_modules() if isinstance(module, kinds)
    ]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no CoreAttention or TrainableMLA, so vLLM has no KV cache "
            "to serve it from; call replace_with_trainable_attention(model) in the factory "
            f"({ORDER}), or build the model with TrainableFlashAttention"
        )
    layers: list[PagedAttention] = []
    names = cache_names([f"{prefix}.{n}" if prefix else n for n, _ in found])
    for (qualified, module), name in zip(found, names, strict=True):
        if not module.spec.causal:
            raise ValueError(f"{qualified}: causal=False cannot be served from a KV cache")
        options = {
            "prefix": name,
            "vllm_config": vllm_config,
            "on_weights_ready": on_weights_ready if name == names[-1] else _nothing,
        }
        try:
            layers.append(_paged(module, qualified, options))
        except ValueError as error:
            raise ValueError(f"{qualified}: {error}") from error
        module.bind(layers[-1])
    return layers


def _nothing() -> None:
    """The completion call of all layers but the last."""


def _paged(module: nn.Module, qualified: str, options: dict[str, Any]) -> PagedAttention:
    exact = _vllm.serves_exactly(options["vllm_config"])
    if isinstance(module, TrainableMLA):
        layer = _vllm_mla.paged_latent_layer(module, exact=exact, **options)
        return PagedLatent(layer, qualified)
    assert isinstance(module, CoreAttention)  # noqa: S101 - `bind` looked for these two
    layer = _vllm.paged_attention_layer(
        num_heads=module.num_heads,
        num_kv_heads=module.num_kv_heads,
        head_size=module.head_dim,
        spec=module.spec,
        has_sinks=module.has_sinks,
        exact=exact,
        **options,
    )
    return PagedAttention(layer, qualified)
