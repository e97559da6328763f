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
from torch.distributed.tensor import DTensor, distribute_tensor

from vllm_graft.weights.errors import WeightError
from vllm_graft.weights.rows import Part, rows_in
from vllm_graft.weights.shards import Shard, cut, shard_of, whole_shape


@torch.no_grad()
def write(param: torch.Tensor, loaded_weight: torch.Tensor, row: Part = None) -> None:
    """Copy a full tensor into `param`, or into a part of its dim 0.

    Args:
        param: `[...]`, plain or DTensor, whose shard is cut out here; values are
            converted to its dtype.
        loaded_weight: `[...]` of the same shape; without dim 0 for one row, and with
            `len(row)` rows for several.
        row: index or indices into dim 0 of the whole (unsharded) parameter.
    """
    noted = getattr(param, "rows_written", None)
    if noted is not None:
        noted.add(row)
    _same_shape(loaded_weight, _shape(whole_shape(param), row))
    if isinstance(param, DTensor):
        _write_shard(param, loaded_weight, row)
    elif (shard := shard_of(param)) is not None:
        _write_share(param, loaded_weight, row, shard)
    elif row is None:
        param.copy_(loaded_weight)
    else:
        _put_rows(param, *_several(row, loaded_weight))


def note_writes(tensor: Any) -> None:
    """Have a tensor written by `write` and remember which rows were, in `rows_written`.

    vLLM copies the attributes to the stand-ins of a reload, so those report to the
    same set. A tensor with a `weight_loader` of its own keeps it.
    """
    if not hasattr(tensor, "weight_loader"):
        tensor.weight_loader = write
        tensor.rows_written = set()


def check(where: str, tensor: torch.Tensor, param: torch.Tensor, row: Part) -> None:
    """Raise if `tensor` cannot be (a part of) `param`.

    Raises:
        WeightError: a row out of range, another shape, or quantized values.
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
    if wide_float(param) and quantized:
        raise WeightError(
            f"{where}: dtype {tensor.dtype} for a {param.dtype} parameter looks quantized; "
            "dequantize it with its scale first"
        )


def wide_float(param: torch.Tensor) -> bool:
    """Whether a parameter holds floating-point numbers of 16 bits or more."""
    return param.is_floating_point() and param.element_size() > 1


def put(where: str, tensor: torch.Tensor, param: Any, row: Part) -> None:
    """Write through the parameter's `weight_loader`, where it has one.

    Raises:
        WeightError: the loader refused; its reason is in the text.
    """
    loader = getattr(param, "weight_loader", write)
    try:
        if row is None:
            loader(param, tensor)
        else:
            loader(param, tensor, row=row)
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


def _several(row: Part, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row indices `[rows]` and their values `[rows, ...]`, one row being one of several."""
    if isinstance(row, tuple):
        return torch.tensor(row), tensor
    return torch.tensor([row]), tensor[None]


def _put_rows(local: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    # vLLM's reload counts what `copy_` writes; elements written otherwise are lost in an update.
    steps = rows.diff() != 1
    starts = [0, *(steps.nonzero().flatten() + 1).tolist()] if len(rows) else []
    for start, end in pairwise([*starts, len(rows)]):
        first = int(rows[start])
        local[first : first + end - start].copy_(values[start:end])


def _write_share(param: torch.Tensor, tensor: torch.Tensor, row: Part, shard: Shard) -> None:
    """Every rank has the whole tensor: each keeps its share, nothing is sent."""
    if row is None:
        param.copy_(cut(tensor, shard))
        return
    rows, values = _several(row, tensor)
    if shard.dim != 0:
        _put_rows(param, rows, cut(values, shard))
        return
    mine = rows // param.shape[0] == shard.rank
    _put_rows(param, rows[mine] % param.shape[0], values[mine])


def _write_shard(param: DTensor, tensor: torch.Tensor, row: Part) -> None:
    """Every rank has the whole tensor: each keeps its slice, nothing is sent."""
    tensor = tensor.to(dtype=param.dtype, device=param.device)
    if row is None:
        sharded = distribute_tensor(tensor, param.device_mesh, param.placements, src_data_rank=None)
        param.copy_(sharded)
        return
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        param.shape, param.device_mesh, param.placements
    )
    rows, values = _several(row, tensor)
    mine = (rows >= offset[0]) & (rows < offset[0] + shape[0])
    here = [slice(o, o + n) for o, n in zip(offset[1:], shape[1:], strict=True)]
    _put_rows(param.to_local(), rows[mine] - offset[0], values[mine][(slice(None), *here)])
