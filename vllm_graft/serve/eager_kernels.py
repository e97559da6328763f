"""Operations that a compiler would round in another way, kept with their eager kernels.

A sum over another order of additions, or `exp` by another polynomial, gives other last bits. In a
recorded graph each such operation becomes one of Graft's, which calls the eager kernel and which
the compiler does not open. What is left to it rounds every number by itself, by IEEE's rules.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx

from vllm_graft.exact import define_op

_aten = torch.ops.aten


def _operations(names: str) -> set[Any]:
    return {getattr(_aten, name) for name in names.split()}


_MOVES = _operations(
    """_to_copy copy clone cat stack index index_select gather embedding scatter slice_scatter
    constant_pad_nd repeat tril triu where masked_fill fill full full_like zeros zeros_like ones
    ones_like empty empty_like new_empty new_zeros new_ones new_full empty_strided arange
    scalar_tensor lift_fresh lift_fresh_copy _unsafe_view"""
)
"""Numbers are made, moved or cast; no view, which the compiler knows as such."""
_ROUNDS = _operations(
    """add sub mul div neg abs sqrt rsqrt reciprocal clamp clamp_min clamp_max minimum maximum"""
)
"""Each number for itself, as IEEE has it."""
_ROUNDS_16_BITS = _operations("silu sigmoid")
"""Computed in float32: in 16 bits the same number comes out."""


class NotRecordableError(ValueError):
    """The forward does something that one graph for all numbers of tokens cannot do."""


def keep_eager_kernels(graph: fx.Graph) -> None:
    """Hide from the compiler what it would round in another way.

    Args:
        graph: of ATen operations, as `make_fx` writes them; changed.

    Raises:
        NotRecordableError: such an operation writes into its argument.
    """
    for node in graph.nodes:
        if _is_aten(node.target) and not _same_compiled(node):
            node.target = _eager(node.target)


def _is_aten(op: Any) -> bool:
    return isinstance(op, torch._ops.OpOverload) and op.namespace in ("aten", "prims")


def _same_compiled(node: fx.Node) -> bool:
    op: Any = node.target
    packet = op.overloadpacket
    if op._schema.is_mutable:  # add_ as add
        packet = getattr(_aten, packet.__name__.removesuffix("_"), packet)
    made = node.meta["val"]
    if (
        op.is_view
        or packet in _MOVES | _ROUNDS
        or not isinstance(made, (torch.Tensor, tuple, list))
    ):
        return True
    if packet is _aten.pow and node.args[1] == 2:
        return True
    dtype = made.dtype if isinstance(made, torch.Tensor) else torch.float64
    whole = not (dtype.is_floating_point or dtype.is_complex)  # numbers that are not rounded
    return whole or (packet in _ROUNDS_16_BITS and dtype.itemsize == 2)


@functools.cache
def _eager(op: Any) -> Any:
    """`op` as an operation of Graft's."""
    if op._schema.is_mutable:
        raise NotRecordableError(f"{op} writes into its argument")
    name = f"eager_{str(op).replace('.', '_')}"
    define_op(f"{name}({str(op._schema).split('(', 1)[1]}", op, op)
    return getattr(torch.ops.vllm_graft, name).default
