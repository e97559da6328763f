"""vLLM's packed products on CPU, behind `products.Packer` (internals of vLLM, as `_vllm.py`).

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
from vllm_graft.tiles import Product, Rows, fill_by_rows, linear_rows, same_order


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
    """vLLM's packed oneDNN products, by which its own linear layers serve on CPU.

    Relies on `create_onednn_mm` and `onednn_mm` of `vllm._custom_ops`, up to 0.32.

    Args:
        exact: take only weights whose products have the bits of `exact.linear`, and give a row
            the same bits among any others.
    """

    def __init__(self, *, exact: bool) -> None:
        self._exact = exact
        self._dtypes = tuple(filter(packs, (torch.bfloat16, torch.float32)))
        self._fewest = 1
        """Fewer rows are padded to so many."""

    def takes(self, weight: torch.Tensor) -> bool:
        """Whether `weight` is a matrix that may be packed."""
        plain = isinstance(weight, torch.nn.Parameter) and type(weight.data) is torch.Tensor
        fits = plain and weight.dim() == 2 and weight.dtype in self._dtypes
        if not (fits and weight.device.type == "cpu"):
            return False
        return self.joins([weight])

    def joins(self, weights: Sequence[torch.Tensor]) -> bool:
        """Whether one product by `weights` has the bits of a product by each."""
        rows = tuple(weight.shape[0] for weight in weights)
        return not self._exact or _adds_as_linear(rows, weights[0].shape[1], weights[0].dtype)

    def pack(self, weight: torch.Tensor) -> OneDnnKernel:
        """A packed copy of `[M, K]`."""
        return _packed(weight)

    def settle(self, run: Callable[[int], None]) -> None:
        """Find out how many rows take the least time.

        oneDNN's kernels for one row and two read weights from memory slower than those for four:
        26, 36 and 21 ms for the products of a 0.5B step on an AMD EPYC. Only exact products are
        padded to what was found: theirs are the same bits among any rows.

        Args:
            run: makes all products of a step with so many rows.
        """
        if self._exact:
            self._fewest = 1
            times = {rows: min(_seconds(run, rows) for _ in range(_TRIES)) for rows in _FEW}
            best = min(_FEW, key=times.__getitem__)
            self._fewest = best if times[best] < _WORTH_IT * times[1] else 1

    def multiply(
        self, x: torch.Tensor, bias: torch.Tensor | None, handle: torch.Tensor, rows: int
    ) -> torch.Tensor:
        """`[..., K]` to `[..., rows]`; see `products.Packer`."""
        flat = x.reshape(-1, x.shape[-1])
        if self._exact:
            out = _multiply_exactly(flat, bias, handle, rows, self._fewest)
        else:
            out = _multiply(flat, bias, handle, rows)
        return out.view(*x.shape[:-1], rows)


_FEW = (1, 2, 4, 8)
_TRIES = 5
_WORTH_IT = 0.97
"""Share of the time of a lone row below which others are worth padding to."""


def _seconds(run: Callable[[int], None], rows: int) -> float:
    start = time.perf_counter()
    run(rows)
    return time.perf_counter() - start


def _packed(weight: torch.Tensor) -> OneDnnKernel:
    from vllm import _custom_ops as ops

    return OneDnnKernel(ops.create_onednn_mm(weight.t(), 32))


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
def _adds_as_linear(rows: tuple[int, ...], inputs: int, dtype: torch.dtype) -> bool:
    """Whether a packed product has the bits of a `F.linear` by each part of the weight.

    In float32 it often has not.
    """

    def apart(weight: torch.Tensor) -> Product:
        return lambda x: torch.cat([F.linear(x, part) for part in weight.split(rows)], -1)

    return same_order(_by_packed_weight, apart, sum(rows), inputs, dtype)


@dataclass(frozen=True)
class OneDnnKernel:
    """Keeps vLLM's handler alive, which frees the packed weight when it goes."""

    handler: Any

    @property
    def handle(self) -> torch.Tensor:
        """The address of the handler, `[1]` int64."""
        address: torch.Tensor = self.handler.handler_tensor.view(1)
        return address
