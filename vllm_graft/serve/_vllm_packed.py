"""Packed products on CPU, behind `products.Packer`; vLLM's are its internals, as in `_vllm.py`.

Legend: R rows, K inputs, M outputs.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from vllm_graft.exact import compiled_serving, define_op
from vllm_graft.kernels import packed_bf16
from vllm_graft.products import Kernel, Packed, is_plain
from vllm_graft.tiles import Product, Rows, fill_by_rows, linear_rows, same_order, telling


@functools.cache
def packs(dtype: torch.dtype) -> bool:
    """Whether this processor has packed products in `dtype`: bf16 ones need AVX-512."""
    from vllm import _custom_ops as ops

    if not ops._supports_onednn:
        return False
    try:
        ops.create_onednn_mm(torch.zeros(32, 32, dtype=dtype).t(), 32)
    except RuntimeError:  # oneDNN has no such primitive; vLLM's own layers go without it too
        return False
    return True


class CpuPacker:
    """Packed products on CPU: Graft's own where there are, else vLLM's by oneDNN.

    Args:
        exact: take only weights whose products have the bits of `exact.linear`, and give a row
            the same bits among any others.
    """

    def __init__(self, *, exact: bool) -> None:
        self._exact = exact
        self._dtypes = tuple(filter(packs, (torch.bfloat16, torch.float32)))
        self._one_dnn = OneDnn(exact=exact)

    def kernel(self, weights: Sequence[torch.Tensor]) -> Kernel | None:
        """See `products.Packer`."""
        if not all(map(self._may_pack, weights)):
            return None
        first = weights[0]
        parts, inputs = tuple(weight.shape[-2] for weight in weights), first.shape[-1]
        if packed_bf16.takes(first):
            chunk = chunk_as_linear(parts, inputs) if self._exact else inputs
            if chunk is not None:
                return PackedBf16(chunk)
        if first.dim() > 2:
            return None
        same = not self._exact or _adds_as_linear(parts, inputs, first.dtype)
        return self._one_dnn if same else None

    def _may_pack(self, weight: torch.Tensor) -> bool:
        fits = is_plain(weight) and weight.dim() in (2, 3) and weight.dtype in self._dtypes
        return fits and weight.device.type == "cpu"

    def settle(self, copies: Sequence[Packed]) -> None:
        """See `products.Packer`."""
        timed = [copy for copy in copies if copy.kernel is self._one_dnn]
        if timed:
            self._one_dnn.settle(lambda rows: _rehearse(timed, rows))


_REHEARSED = 1 << 28
"""Bytes of weights that a rehearsal reads: more than caches hold, and little time."""


@torch.no_grad()
def _rehearse(copies: Sequence[Packed], rows: int) -> None:
    """Make the products of a step with so many rows, as far as `_REHEARSED` goes."""
    left = _REHEARSED
    for packed in copies:
        if left <= 0:
            return
        left -= packed.rehearse(rows)


@dataclass(frozen=True)
class PackedBf16:
    """Graft's own products, adding up so many inputs at a time."""

    chunk: int

    def pack(self, weights: Sequence[torch.Tensor]) -> packed_bf16.Packed:
        """See `products.Kernel`."""
        if weights[0].dim() == 2:
            return packed_bf16.pack(weights)
        return packed_bf16.pack([own for expert in zip(*weights, strict=True) for own in expert])

    def unpack(self, copy: Any, like: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """See `products.Kernel`."""
        outputs = [weight.shape[-2] for weight in like]
        if like[0].dim() == 2:
            return packed_bf16.unpack(copy, outputs)
        matrices = packed_bf16.unpack(copy, outputs * len(like[0]))
        return [torch.stack(matrices[part :: len(like)]) for part in range(len(like))]

    def multiply(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        handle: torch.Tensor,
        outputs: Sequence[int],
        counts: torch.Tensor | None = None,
    ) -> Sequence[torch.Tensor]:
        """See `products.Kernel`."""
        if counts is not None:
            return packed_bf16.multiply_experts(x, counts, handle, outputs, self.chunk)
        parts = packed_bf16.multiply(x.reshape(-1, x.shape[-1]), bias, handle, outputs, self.chunk)
        return [part.view(*x.shape[:-1], part.shape[-1]) for part in parts]


class OneDnn:
    """vLLM's packed oneDNN products, by which its own linear layers serve on CPU.

    Relies on `create_onednn_mm` and `onednn_mm` of `vllm._custom_ops`, up to 0.32.

    Args:
        exact: give a row the same bits among any others.
    """

    def __init__(self, *, exact: bool) -> None:
        self._exact = exact
        self._fewest = 1
        """Fewer rows are padded to so many."""

    def pack(self, weights: Sequence[torch.Tensor]) -> OneDnnCopy:
        """See `products.Kernel`."""
        return _packed(weights[0] if len(weights) == 1 else torch.cat(list(weights)))

    def unpack(self, copy: Any, like: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """By a product with the unit matrix: every number, but for the sign of zeros."""
        outputs = [len(weight) for weight in like]
        unit = torch.eye(like[0].shape[1], dtype=like[0].dtype)
        parts = [self.multiply(some, None, copy.handle, outputs) for some in unit.split(256)]
        return [torch.cat(columns).t().contiguous() for columns in zip(*parts, strict=True)]

    def settle(self, run: Callable[[int], None]) -> None:
        """Find out how many rows take the least time.

        oneDNN's kernels for one row and two may read weights from memory slower than those for
        four. Only exact products are padded to what was found: theirs are the same bits among any
        rows.

        Args:
            run: makes all products of a step with so many rows.
        """
        if self._exact:
            self._fewest = 1
            times = {rows: min(_seconds(run, rows) for _ in range(_TRIES)) for rows in _FEW}
            best = min(_FEW, key=times.__getitem__)
            self._fewest = best if times[best] < _WORTH_IT * times[1] else 1

    def multiply(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        handle: torch.Tensor,
        outputs: Sequence[int],
        counts: torch.Tensor | None = None,
    ) -> Sequence[torch.Tensor]:
        """See `products.Kernel`; no stacks."""
        flat, together = x.reshape(-1, x.shape[-1]), sum(outputs)
        if self._exact:
            out = _multiply_exactly(flat, bias, handle, together, self._fewest)
        else:
            out = _multiply(flat, bias, handle, together)
        parts: Sequence[torch.Tensor] = out.view(*x.shape[:-1], together).split(outputs, -1)
        return parts


_FEW = (1, 2, 4, 8)
_TRIES = 5
_WORTH_IT = 0.97
"""Share of the time of a lone row below which others are worth padding to."""


def _seconds(run: Callable[[int], None], rows: int) -> float:
    start = time.perf_counter()
    run(rows)
    return time.perf_counter() - start


def _packed(weight: torch.Tensor) -> OneDnnCopy:
    from vllm import _custom_ops as ops

    return OneDnnCopy(ops.create_onednn_mm(weight.t(), 32))


def _multiply(
    x: torch.Tensor, bias: torch.Tensor | None, handle: torch.Tensor, outputs: int
) -> torch.Tensor:
    out = x.new_empty(x.shape[0], outputs)
    torch.ops._C.onednn_mm(out, x.contiguous(), bias, handle)
    return out


def _multiply_exactly(
    x: torch.Tensor, bias: torch.Tensor | None, handle: torch.Tensor, outputs: int, fewest: int
) -> torch.Tensor:
    """`_multiply` by numbers of rows that give each the same bits, not below `fewest`."""
    rows, step = x.shape[0], _packed_step(outputs, x.shape[1], x.dtype)
    if step is None and compiled_serving():
        out: torch.Tensor = torch.ops.vllm_graft.packed_linear(x, bias, handle, outputs)
        return out
    if not compiled_serving() and (step is None or rows >= fewest):
        return _multiply_by_rows(x, bias, handle, outputs)
    # One graph serves all numbers of rows and believes that they are two at least: a lone row
    # follows from the remainder.
    padded = torch.sym_max(rows + -rows % step, fewest)
    return _multiply(F.pad(x, (0, 0, 0, padded - rows)), bias, handle, outputs)[:rows]


def _multiply_by_rows(
    x: torch.Tensor, bias: torch.Tensor | None, handle: torch.Tensor, outputs: int
) -> torch.Tensor:
    def fill(part: torch.Tensor, room: torch.Tensor) -> None:
        torch.ops._C.onednn_mm(room, part, bias, handle)

    out = x.new_empty(x.shape[0], outputs)
    fill_by_rows(fill, x.contiguous(), out, _packed_rows(outputs, x.shape[1], x.dtype))
    return out


define_op(
    "packed_linear(Tensor x, Tensor? bias, Tensor handle, int outputs) -> Tensor",
    _multiply_by_rows,
    lambda x, bias, handle, outputs: x.new_empty(x.shape[0], outputs),
)


def _by_packed_weight(weight: torch.Tensor) -> Product:
    kernel = _packed(weight)
    return lambda x: _multiply(x, None, kernel.handle, weight.shape[0])


def _packed_rows(outputs: int, inputs: int, dtype: torch.dtype) -> Rows:
    return linear_rows(_by_packed_weight, outputs, inputs, dtype, torch.get_num_threads())


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _packed_step(outputs: int, inputs: int, dtype: torch.dtype) -> int | None:
    return _packed_rows(outputs, inputs, dtype).step


@functools.cache
def _adds_as_linear(parts: tuple[int, ...], inputs: int, dtype: torch.dtype) -> bool:
    """Whether one packed product by weights of so many rows has the bits of `F.linear` by each.

    In float32 it often has not.
    """

    def apart(weight: torch.Tensor) -> Product:
        return lambda x: torch.cat([F.linear(x, part) for part in weight.split(parts)], -1)

    return same_order(_by_packed_weight, apart, sum(parts), inputs, dtype)


@functools.cache
def chunk_as_linear(parts: tuple[int, ...], inputs: int) -> int | None:
    """The chunk by which `packed_bf16` has the bits of `F.linear` by weights of so many rows."""
    with torch.inference_mode(False), torch.no_grad():
        joined, x = telling(sum(parts), inputs, torch.bfloat16)
        weights = joined.split(parts)
        want, packed = [F.linear(x, weight) for weight in weights], packed_bf16.pack(weights)

        def has_the_bits(chunk: int) -> bool:
            got = packed_bf16.multiply(x, None, packed.handle, parts, chunk)
            return all(map(torch.equal, got, want))

        return packed_bf16.find_chunk(inputs, has_the_bits)


@dataclass(frozen=True)
class OneDnnCopy:
    """Keeps vLLM's handler alive, which frees the packed weight when it goes."""

    handler: Any

    @property
    def handle(self) -> torch.Tensor:
        """The address of the handler, `[1]` int64."""
        address: torch.Tensor = self.handler.handler_tensor.view(1)
        return address
