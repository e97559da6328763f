"""Llama-style blocks with projections `wq`, `wk`, `wv`, `wo`: older TorchTitan, Meta's llama.

Such blocks have no seam, so the whole block is swapped and the old projections
and norms are adopted under their old names. Whether the new block computes
what the old one did is tried out before anything is changed (`proof.py`).
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from vllm_graft.attention.core import CoreAttention
from vllm_graft.attention.flash import TrainableFlashAttention
from vllm_graft.families.proof import prove
from vllm_graft.families.swap import Swap, swap_of
from vllm_graft.order import ORDER
from vllm_graft.positions import current_batch

KIND = "block"
_ADOPTED = ("wq", "wk", "wv", "wo", "q_norm", "k_norm")
_TABLE_ARGUMENT = re.compile(r"freqs|rope|rotary|^cos|^sin")


class AdoptedAttention(TrainableFlashAttention):
    """A block around the projections of an old one, called as the old one was."""

    def __init__(self, old: Any, table_argument: str | None) -> None:
        nn.Module.__init__(self)
        for name in _ADOPTED:
            setattr(self, name, getattr(old, name, None))
        self.use_fused_qkv, self.rope_interleaved = False, True
        self.core = _core_of(old)
        self.training = old.training
        self._signature = inspect.signature(type(old).forward)
        self._table_argument = table_argument

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Attend; takes the old block's arguments."""
        bound = self._signature.bind(self, *args, **kwargs).arguments
        hidden_states = bound[list(bound)[1]]
        table = bound.get(self._table_argument) if self._table_argument else None
        for name, value in bound.items():
            if "mask" in name:
                _check_causal(name, value)
        return super().forward(hidden_states, table, positions=bound.get("positions"))


def matches(attention: nn.Module) -> bool:
    """Whether the block has the four projections."""
    return all(isinstance(getattr(attention, w, None), nn.Module) for w in ("wq", "wk", "wv", "wo"))


def plan(attention: Any) -> Swap:
    """Build the new block, without touching the old one.

    Raises:
        ValueError: the block computes something the new one would not.
    """
    if isinstance(attention, AdoptedAttention):
        return swap_of(KIND, attention.core)
    _refuse_sharded(attention)
    _check_parts(attention)
    table = _table_argument(attention)
    new = AdoptedAttention(attention, table)
    proven = prove(attention, new, table)
    return swap_of(KIND, new.core, replacement=new, proven=proven)


_REPLACED = {"sdpa", "inner_attention", "attn_dropout", "resid_dropout", "dropout"}
"""Children without parameters whose work `CoreAttention` does."""


def _refuse_sharded(attention: Any) -> None:
    sharded = [name for name in ("wq", "wk", "wv", "wo") if _is_dtensor(getattr(attention, name))]
    if sharded:
        raise ValueError(
            f"{type(attention).__name__} was parallelized before its attention was replaced "
            f"({', '.join(sharded)} are DTensors); {ORDER}"
        )


def _is_dtensor(projection: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in projection.parameters())


def _check_parts(attention: nn.Module) -> None:
    children = {name for name, _ in attention.named_children()} - _REPLACED
    own = {name for name, _ in attention.named_parameters(recurse=False)} | set(attention._buffers)
    extra = (children | own) - set(_ADOPTED)
    if extra:
        raise ValueError(
            f"{type(attention).__name__} has parts that a swapped block would drop: {sorted(extra)}"
        )


def _table_argument(attention: nn.Module) -> str | None:
    """The forward argument that carries the RoPE table.

    Raises:
        ValueError: RoPE is applied inside, from no argument or from several.
    """
    forward = type(attention).forward
    named = [n for n in inspect.signature(forward).parameters if _TABLE_ARGUMENT.search(n)]
    if len(named) == 1:
        return named[0]
    if named or re.search(r"rope|rotary", _source(forward)):
        raise ValueError(
            f"{type(attention).__name__}.forward applies RoPE, but takes its table from "
            f"{named or 'no argument'}; exactly one argument (freqs_cis, rope_cache) is expected"
        )
    return None


def _source(function: Any) -> str:
    try:
        return inspect.getsource(function)
    except OSError:
        return ""


def _core_of(old: Any) -> CoreAttention:
    head_dim = _first(old, "head_dim")
    num_heads = _first(old, "n_heads", "num_heads", "n_local_heads")
    if head_dim is None and num_heads is None:
        raise ValueError(f"{type(old).__name__} has neither head_dim nor n_heads: {old}")
    rows = {name: getattr(old, name).weight.shape[0] for name in ("wq", "wk", "wv")}
    head_dim = head_dim or rows["wq"] // num_heads
    for name, count in rows.items():
        if count % head_dim:
            raise ValueError(f"{name} has {count} rows, not a multiple of {head_dim=}")
    return CoreAttention(
        rows["wq"] // head_dim,
        rows["wk"] // head_dim,
        head_dim,
        scale=_first(old, "softmax_scale", "scaling", "scale"),
        sliding_window=_first(old, "sliding_window", "window_size", "attention_window", "window"),
        dropout=float(_first(old, "dropout", "dropout_p") or 0.0),
    )


def _first(old: Any, *names: str) -> Any:
    """The first of these attributes that is a plain number."""
    values = (getattr(old, name, None) for name in names)
    return next((v for v in values if isinstance(v, (int, float)) and v is not True), None)


def _check_causal(name: str, mask: Any) -> None:
    """Refuse a dense mask that is not the causal one, which the block applies by itself."""
    batch = current_batch()
    if not isinstance(mask, torch.Tensor) or (batch is not None and batch.serving):
        return
    allowed = mask if mask.dtype == torch.bool else mask == 0
    rows, columns = mask.shape[-2:]
    if rows != columns or not torch.equal(allowed, torch.ones_like(allowed).tril()):
        raise ValueError(
            f"{name} {tuple(mask.shape)} is not the plain causal mask; use vllm_graft.packed(...) "
            "for packed samples"
        )
