"""Does a swapped block compute what the old one did? Tried on a few random tokens.

A block is free to clamp, to rotate halves instead of pairs, or to divide by
what it calls its scale. Its attributes do not tell, its output does.

Legend: L tokens, D width, H head dim.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import nn

_TOKENS = 48
_MOST_TOKENS = 1100
"""A trial with a sliding window is longer than the window, up to this."""
_SPREAD = 3.0
"""Standard deviation of the attention scores in the trial: far from uniform, not one-hot."""

# Other kernels and orders of summation; any real difference is 100 times as large.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_LOW_PRECISION = 5e-2


def prove(old: Any, new: Any, table_argument: str | None) -> bool:
    """Compare the two blocks, and settle how `new` pairs dimensions in real RoPE tables.

    Args:
        old: the block as it is.
        new: its replacement, around the same projections.
        table_argument: the forward argument that carries the RoPE table, if any.

    Returns:
        True if they agree; False if the old block could not be tried (on meta,
        no tensor returned, arguments that cannot be guessed, or a window longer
        than the trial).

    Raises:
        ValueError: the old block ran, and `new` gives something else.
    """
    weight = old.wq.weight
    forward = type(old).forward
    if weight.is_meta or forward is nn.Module.forward or not isinstance(weight, torch.Tensor):
        return False
    modes = [(module, module.training) for module in old.modules()]
    old.eval(), new.eval()
    try:
        with torch.no_grad():
            smallest = _smallest_difference(old, new, table_argument)
    finally:
        for module, mode in modes:
            module.training = mode
        new.training = new.core.training = old.training
    limit = _TOLERANCE.get(weight.dtype, _LOW_PRECISION)
    if smallest is not None and smallest > limit:
        raise ValueError(
            f"{type(old).__name__} computes something else than projections, RoPE and causal "
            f"attention: on {_length(new)} random tokens the swapped block differs by "
            f"{smallest:.2g} of the largest value (limit {limit:g}). Swap a seam of your own: call "
            "CoreAttention where the block has q, k and v"
        )
    window = new.core.spec.sliding_window
    return smallest is not None and (window is None or window < _length(new))


def _length(new: Any) -> int:
    """Tokens of the trial: more than the block's window, where that is affordable."""
    window = new.core.spec.sliding_window or 0
    return min(max(_TOKENS, window + 9), _MOST_TOKENS)


def _smallest_difference(old: Any, new: Any, table_argument: str | None) -> float | None:
    """The best agreement over the ways to call the old block; None if none of them runs."""
    smallest = None
    for arguments in _calls(old, new, table_argument):
        try:
            want = old(**arguments)
        except Exception:  # noqa: S112 - any failure means: not called like this
            continue
        if not isinstance(want, torch.Tensor):
            continue
        for interleaved in (True, False):
            new.rope_interleaved = interleaved
            difference = _difference(new, arguments, want)
            smallest = difference if smallest is None else min(smallest, difference)
            if smallest <= _TOLERANCE[torch.float32]:
                return smallest
    return smallest


def _difference(new: Any, arguments: dict[str, Any], want: torch.Tensor) -> float:
    try:
        got = new(**arguments)
    except (ValueError, IndexError, RuntimeError):
        return float("inf")
    if want.shape != got.shape:
        return float("inf")
    largest = want.float().abs().max().clamp_min(1e-12)
    return float((got.float() - want.float()).abs().max() / largest)


def _calls(old: Any, new: Any, table_argument: str | None) -> Iterator[dict[str, Any]]:
    """Arguments to try: every table layout, with and without a dense causal mask."""
    parameters = list(inspect.signature(type(old).forward).parameters.values())[1:]
    x = _tokens(old, new)
    masks = [p.name for p in parameters if "mask" in p.name]
    tables = _tables(new.core.head_dim, x) if table_argument else [None]
    for table, mask in product(tables, (False, True) if masks else (False,)):
        arguments: dict[str, Any] = {parameters[0].name: x}
        if table_argument:
            arguments[table_argument] = table
        for parameter in parameters[1:]:
            name = parameter.name
            if name in masks:
                arguments[name] = _causal_mask(x) if mask else None
            elif parameter.default is parameter.empty and "start" in name:
                arguments[name] = 0
        yield arguments


def _tokens(old: Any, new: Any) -> torch.Tensor:
    """Random input `[1, L, D]` scaled so that the attention scores have a healthy spread."""
    weight = old.wq.weight
    generator = torch.Generator().manual_seed(0)
    shape = (1, _length(new), weight.shape[1])
    x = torch.randn(shape, generator=generator, device="cpu").to(weight)
    q, k, _ = new._project(x)
    heads = min(q.shape[-2], k.shape[-2])
    scores = torch.einsum("blnh,bmnh->bnlm", q[..., :heads, :].float(), k[..., :heads, :].float())
    spread = float(scores.std()) * abs(new.core.spec.scale)
    scale: float = (_SPREAD / max(spread, 1e-12)) ** 0.5
    return x * scale


def _tables(head_dim: int, x: torch.Tensor) -> list[torch.Tensor]:
    """One RoPE table in each layout of `rope.apply_rope`: complex, cos|sin, cos|cos|sin|sin."""
    length, device = x.shape[1], x.device
    frequencies = 10000.0 ** -(torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    angles = torch.outer(torch.arange(length, device=device).float(), frequencies)
    cos, sin = angles.cos(), angles.sin()
    real, doubled = torch.cat([cos, sin], -1), torch.cat([cos, cos, sin, sin], -1)
    return [torch.complex(cos, sin), real, doubled]


def _causal_mask(x: torch.Tensor) -> torch.Tensor:
    return x.new_full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
