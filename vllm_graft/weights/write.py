"""Writing one checkpoint tensor into a parameter, or into rows of it.

`write` has the signature of vLLM's weight loaders. A served model has it on its
tensors as `weight_loader`, since vLLM's reload defers writes by wrapping exactly that;
`note_writes` puts it there.
"""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import torch

from vllm_graft.weights.errors import WeightError
from vllm_graft.weights.reading import AS_IT_IS, Reading
from vllm_graft.weights.rows import Part, rows_in
from vllm_graft.weights.shards import Region, agreed, local, region_of, whole_shape


@torch.no_grad()
def write(
    param: torch.Tensor,
    loaded_weight: torch.Tensor,
    row: Part = None,
    reading: Reading = AS_IT_IS,
) -> None:
    """Copy this rank's share of a full tensor into `param`, or into a part of its dim 0.

    Args:
        param: `[...]`, plain or DTensor; values are converted to its dtype. Only the share
            that it is of the whole is read.
        loaded_weight: `[...]` of the same shape; without dim 0 for one row, and with
            `len(row)` rows for several.
        row: index or indices into dim 0 of the whole (unsharded) parameter.
        reading: what the tensor needs before.
    """
    noted = getattr(param, "rows_written", None)
    if noted is not None:
        noted.add(row)
    _same_shape(loaded_weight, _shape(whole_shape(param), row))
    mine, (rows, values) = local(param), _share(param, loaded_weight, row, reading)
    if rows is None:
        mine.copy_(values)
    else:
        _put_rows(mine, rows, values)


@torch.no_grad()
def holds(param: torch.Tensor, tensor: torch.Tensor, row: Part, reading: Reading) -> bool:
    """Whether `write` would change nothing, on any rank; all ranks must call this.

    Unknown on meta, and taken as yes.
    """
    if param.is_meta:
        return True
    mine, (rows, values) = local(param), _share(param, tensor, row, reading)
    held = mine if rows is None else mine[rows]
    return agreed(param, torch.equal(held, values.to(dtype=held.dtype, device=held.device)))


def _share(
    param: torch.Tensor, tensor: torch.Tensor, row: Part, reading: Reading
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """What this rank writes: rows of its local tensor (None: all of them) and their values."""
    region = region_of(param)
    if row is None:
        return None, _values(param, tensor, region, reading)
    several = isinstance(row, tuple)
    rows = torch.tensor(row if several else [row])
    here = (rows >= region[0].start) & (rows < region[0].stop)
    if several:
        values = _values(param, tensor, (here.nonzero()[:, 0], *region[1:]), reading)
    elif here:
        values = _values(param, tensor, region[1:], reading)[None]
    else:
        values = local(param)[:0]
    return rows[here] - region[0].start, values


def _values(
    param: torch.Tensor, tensor: torch.Tensor, region: Region, reading: Reading
) -> torch.Tensor:
    if param.is_meta:
        # vLLM's reload asks how much a write would copy: nothing need be read for that.
        tensor, reading = tensor.to("meta"), Reading(reading.order)
    return reading.take(tensor, region, param.dtype)


def note_writes(tensor: Any) -> None:
    """Have a tensor written by `write` and remember which rows were, in `rows_written`.

    vLLM copies the attributes to the stand-ins of a reload, so those report to the
    same set. A tensor with a `weight_loader` of its own keeps it.
    """
    if not hasattr(tensor, "weight_loader"):
        tensor.weight_loader = write
        tensor.rows_written = set()


def check(
    where: str, tensor: torch.Tensor, param: torch.Tensor, row: Part, reading: Reading = AS_IT_IS
) -> None:
    """Raise if `tensor` cannot be (a part of) `param`.

    Raises:
        WeightError: a row out of range, another shape, a row order for another number of
            rows, or quantized values without a scale.
    """
    whole = whole_shape(param)
    last = max(rows_in([row]), default=-1)
    if row is not None and (param.dim() == 0 or last >= whole[0]):
        raise WeightError(
            f"{where}: row {last} means at least {last + 1} rows (experts), but the parameter is "
            f"{tuple(whole)}; the model was built for another number"
        )
    expected = _shape(whole, row)
    if tensor.shape != expected and _is_ours(param):
        hint = " (transposed?)" if tensor.shape == expected[::-1] else ""
        which = f"{len(row)} rows" if isinstance(row, tuple) else f"row {row}"
        of = "" if row is None else f", {which} of {tuple(whole)}"
        raise WeightError(
            f"{where}: shape {tuple(tensor.shape)} does not fit {tuple(expected)}{of}{hint}"
        )
    quantized = tensor.element_size() == 1 or not tensor.is_floating_point()
    if wide_float(param) and quantized and reading.scale is None:
        raise WeightError(
            f"{where}: dtype {tensor.dtype} for a {param.dtype} parameter looks quantized; "
            "dequantize it with its scale first"
        )
    if reading.order is not None:
        reading.order.check(where, tensor)


def wide_float(param: torch.Tensor) -> bool:
    """Whether a parameter holds floating-point numbers of 16 bits or more."""
    return param.is_floating_point() and param.element_size() > 1


def put(where: str, tensor: torch.Tensor, param: Any, row: Part, reading: Reading) -> None:
    """Write through the parameter's `weight_loader`, where it has one.

    One that is not `write` gets whole tensors that need nothing more.

    Raises:
        WeightError: the loader refused; its reason is in the text.
    """
    loader = getattr(param, "weight_loader", write)
    more: dict[str, Any] = {} if row is None else {"row": row}
    if _is_ours(param):
        more["reading"] = reading
    else:
        tensor = reading.whole(tensor, param.dtype)
    try:
        loader(param, tensor, **more)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise WeightError(
            f"{where}: cannot write shape {tuple(tensor.shape)} to {tuple(param.shape)}: {error}"
        ) from error


def _is_ours(param: torch.Tensor) -> bool:
    loader = getattr(param, "weight_loader", write)
    return inspect.unwrap(loader) is inspect.unwrap(write)


def _shape(whole: torch.Size, row: Part) -> torch.Size:
    """The shape of a part of a tensor of shape `whole`."""
    if row is None:
        return whole
    return torch.Size((len(row), *whole[1:])) if isinstance(row, tuple) else whole[1:]


def _same_shape(tensor: torch.Tensor, expected: torch.Size) -> None:
    # copy_ would broadcast.
    if tensor.shape != expected:
        raise ValueError(f"expected shape {tuple(expected)}, got {tuple(tensor.shape)}")


def _put_rows(mine: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    # vLLM's reload counts what `copy_` writes; elements written otherwise are lost in an update.
    steps = rows.diff() != 1
    starts = [0, *(steps.nonzero().flatten() + 1).tolist()] if len(rows) else []
    for start, end in pairwise([*starts, len(rows)]):
        first = int(rows[start])
        mine[first : first + end - start].copy_(values[start:end])
