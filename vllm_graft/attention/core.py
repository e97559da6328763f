"""`CoreAttention`: the seam between an external model and vLLM (q, k, v -> out).

Legend: T tokens in the flat batch, B sequences, L length, N query heads,
K key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from vllm_graft.attention.kernels import AttentionSpec, attend, sample_borders
from vllm_graft.order import ORDER
from vllm_graft.positions import current_batch


class PagedLayer(Protocol):
    """A vLLM attention layer with its paged KV cache (`serve.kv` makes them)."""

    def active(self) -> bool:
        """Whether vLLM is running a forward at this moment."""

    def __call__(
        self,
        q_TNH: torch.Tensor,
        k_TKH: torch.Tensor,
        v_TKH: torch.Tensor,
        sinks_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write k and v to the cache and attend to it; `[T, N, H]`."""


class CoreAttention(nn.Module):
    """Attention after projections and RoPE: serves from vLLM's cache, trains by autograd.

    It has no parameters, so swapping it in changes no name in the state dict.
    Built inside vLLM's model construction it is bound to one paged layer and
    uses that while vLLM runs a forward; everywhere else it is an ordinary
    differentiable module.

    Args:
        num_heads: query heads N (on this rank).
        num_kv_heads: key/value heads K; N by default. N must be a multiple of K.
        head_dim: H of queries and keys. Values may be narrower, and are padded to it.
        scale: softmax scale, `head_dim ** -0.5` by default.
        sliding_window: keys a query sees, itself included; None for all.
        softcap: scores become `softcap * tanh(score / softcap)`; None for no cap.
        alibi_slopes: one per query head; `slope * (key - query position)` is added to scores.
        has_sinks: each call brings `sinks`.
        dropout: probability on attention weights, in training mode only.
        causal: whether queries see only keys at or before them.

    Raises:
        ValueError: head counts that do not divide, or a value out of range.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int = 128,
        *,
        scale: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        alibi_slopes: Sequence[float] | None = None,
        has_sinks: bool = False,
        dropout: float = 0.0,
        causal: bool = True,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads={num_heads} is not a multiple of num_kv_heads={num_kv_heads}"
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout={dropout} is not in [0, 1)")
        if sliding_window is not None and sliding_window < 1:
            raise ValueError(f"sliding_window={sliding_window} must be at least 1")
        if softcap is not None and softcap <= 0.0:
            raise ValueError(f"softcap={softcap} must be above 0; None for no cap")
        if alibi_slopes is not None and len(alibi_slopes) != num_heads:
            raise ValueError(f"{len(alibi_slopes)} alibi_slopes for num_heads={num_heads}")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.has_sinks = has_sinks
        self.dropout = dropout
        self.tp_size = 1
        """Tensor-parallel ranks among which the heads were divided; see `attention.shard`."""
        self.spec = AttentionSpec(
            scale=head_dim**-0.5 if scale is None else scale,
            causal=causal,
            sliding_window=sliding_window,
            softcap=softcap,
            alibi_slopes=None if alibi_slopes is None else tuple(alibi_slopes),
        )
        # Not a submodule: the adapter owns the paged layers, the state dict stays the user's.
        self._paged: PagedLayer | None = None

    def head_counts(self) -> dict[str, int]:
        """The counts that tensor parallelism divides."""
        return {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads}

    def shard(self, tp_size: int) -> None:
        """Keep one of `tp_size` equal shares of the heads.

        Raises:
            ValueError: ALiBi, whose slopes are those of all heads.
        """
        if tp_size > 1 and self.spec.alibi_slopes is not None:
            raise ValueError(
                f"alibi_slopes with tensor_parallel_size={tp_size}: the slopes of this rank's "
                "heads are not known; use 1"
            )
        self.num_heads //= tp_size
        self.num_kv_heads //= tp_size
        self.tp_size = tp_size

    def bind(self, layer: PagedLayer) -> None:
        """Use `layer` whenever vLLM runs a forward."""
        self._paged = layer

    def set_window(self, sliding_window: int | None) -> None:
        """Let queries see so many keys, themselves included; None for all.

        Raises:
            ValueError: another window than that of the cache it is bound to.
        """
        if self._paged is not None and sliding_window != self.spec.sliding_window:
            raise ValueError(
                f"sliding_window={sliding_window} for a layer that the engine built with "
                f"{self.spec.sliding_window}"
            )
        self.spec = replace(self.spec, sliding_window=sliding_window)

    def __getstate__(self) -> dict[str, Any]:
        # A copy (deepcopy, pickle) is a plain trainable module: one cache has one owner.
        return {**self.__dict__, "_paged": None}

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        cu_seqlens: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            q: `[T, N, H]` or `[B, L, N, H]`, rotated; k, v: the same with K heads. v may be
                narrower: `[..., K, Hv]`.
            cu_seqlens: `[S + 1]` borders of the samples in the flattened tokens.
                By default those of `packed(...)`, else every row of `[B, L]`
                is one sample, and `[T]` is one.
            sinks: `[N]` scores of a key without value, in every query's softmax.

        Returns:
            The shape of `q`, with v's width.

        Raises:
            ValueError: shapes that disagree with the module's heads, or bad borders.
            RuntimeError: unbound in the engine, or recomputed outside its packed batch.
        """
        self._check(q, k, v, sinks)
        shape, width = q.shape, v.shape[-1]
        # The cache has one width. Columns of zeros change no other column.
        v = F.pad(v, (0, self.head_dim - width)) if width < self.head_dim else v
        out = self._attend(q, k, v, cu_seqlens, sinks).view(shape)
        return out[..., :width]

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        same_dtype = (q.to(v.dtype), k.to(v.dtype), v)
        flat_q, flat_k, flat_v = (x.flatten(0, 1) if x.dim() == 4 else x for x in same_dtype)
        if self._paged is not None and self._paged.active():
            return self._paged(flat_q, flat_k, flat_v, sinks)
        batch = current_batch()
        if batch is not None and batch.serving:
            raise RuntimeError(
                "a CoreAttention without a KV cache runs in the engine. Each must be a registered "
                "submodule of the model that the factory returns (not in a plain list or dict), "
                "and may not be added to a live model"
            )
        borders = sample_borders(self, q.shape[:-2], cu_seqlens)
        dropout = self.dropout if self.training else 0.0
        return attend(flat_q, flat_k, flat_v, borders, self.spec, dropout, sinks)

    def _check(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None
    ) -> None:
        if (None if sinks is None else sinks.shape) != (
            (self.num_heads,) if self.has_sinks else None
        ):
            got = None if sinks is None else tuple(sinks.shape)
            want = f"({self.num_heads},)" if self.has_sinks else "none"
            raise ValueError(f"CoreAttention got sinks {got}, expected {want}")
        lead = q.shape[:-2]
        want_q = (*lead, self.num_heads, self.head_dim)
        want_kv = (*lead, self.num_kv_heads, self.head_dim)
        want_v = (*want_kv[:-1], min(v.shape[-1], self.head_dim))
        if q.dim() not in (3, 4) or (q.shape, k.shape, v.shape) != (want_q, want_kv, want_v):
            raise ValueError(
                f"CoreAttention(num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
                f"head_dim={self.head_dim}) expects q [..., {self.num_heads}, {self.head_dim}] and "
                f"k, v [..., {self.num_kv_heads}, {self.head_dim}] with [T] or [B, L] in front, "
                f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}{self._tp_hint()}"
            )

    def _tp_hint(self) -> str:
        if self.tp_size == 1:
            return ""
        return (
            f". With tensor_parallel_size={self.tp_size} each rank has 1/{self.tp_size} of the "
            "heads: apply tensor parallelism in the factory, after attention replacement "
            f"({ORDER})"
        )

    def extra_repr(self) -> str:
        """Heads, scale and window, for `print(model)`."""
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, scale={self.spec.scale:.6g}, "
            f"sliding_window={self.spec.sliding_window}, softcap={self.spec.softcap}, "
            f"alibi={self.spec.alibi_slopes is not None}, sinks={self.has_sinks}, "
            f"paged={self._paged is not None}"
        )
