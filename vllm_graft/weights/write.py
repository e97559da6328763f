"""Writing one checkpoint tensor into a parameter, or into one row of it.

`write` has the signature of vLLM's weight loaders. A served model has it on its
tensors as `weight_loader`, since vLLM's reload defers writes by wrapping exactly that;
`note_writes` puts it there.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from vllm_graft.weights.errors import WeightError
from vllm_graft.weights.shards import Shard, cut, shard_of, whole_shape


@torch.no_grad()
def write(param: torch.Tensor, loaded_weight: torch.Tensor, row: int | None = None) -> None:
    """Copy a full tensor into `param`, or into row `row` of its dim 0.

    Args:
        param: `[...]`, plain or DTensor, whose shard is cut out here; values are
            converted to its dtype.
        loaded_weight: `[...]` of the same shape, without dim 0 for a row.
        row: index into dim 0 of the whole (unsharded) parameter.
    """
    noted = getattr(param, "rows_written", None)
    if noted is not None:
        noted.add(row)
    if isinstance(param, DTensor):
        _write_shard(param, loaded_weight, row)
    elif (shard := shard_of(param)) is not None:
        _write_share(param, loaded_weight, row, shard)
    else:
        place = param if row is None else param[row]
        _same_shape(loaded_weight, place)
        place.copy_(loaded_weight)


def note_writes(tensor: Any) -> None:
    """Have a tensor written by `write` and remember which rows were, in `rows_written`.

    vLLM copies the attributes to the stand-ins of a reload, so those report to the
    same set. A tensor with a `weight_loader` of its own keeps it.
    """
    if not hasattr(tensor, "weight_loader"):
        tensor.weight_loader = write
        tensor.rows_written = set()


def check(where: str, tensor: torch.Tensor, param: torch.Tensor, row: int | None) -> None:
    """Raise if `tensor` cannot be (a row of) `param`.

    Raises:
        WeightError: a row out of range, another shape, or quantized values.
    """
    whole = whole_shape(param)
    if row is not None and (param.dim() == 0 or row >= whole[0]):
        raise WeightError(
            f"{where}: row {row} means at least {row + 1} rows (experts), but the parameter is "
            f"{tuple(whole)}; the model was built for another number"
        )
    expected = whole if row is None else whole[1:]
    if tensor.shape != expected and _is_ours(param):
        hint = " (transposed?)" if tensor.shape == expected[::-1] else ""
        of = "" if row is None else f", row {row} of {tuple(whole)}"
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


def put(where: str, tensor: torch.Tensor, param: Any, row: int | None) -> None:
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


def _same_shape(tensor: torch.Tensor, place: torch.Tensor) -> None:
    # copy_ would broadcast.
    if tensor.shape != place.shape:
        raise ValueError(f"expected shape {tuple(place.shape)}, got {tuple(tensor.shape)}")


def _write_share(param: torch.Tensor, tensor: torch.Tensor, row: int | None, shard: Shard) -> None:
    """Every rank has the whole tensor: each keeps its share, nothing is sent."""
    if row is None:
        param.copy_(cut(tensor, shard))
    elif shard.dim != 0:
        param[row].copy_(cut(tensor[None], shard)[0])
    elif row // param.shape[0] == shard.rank:
        param[row % param.shape[0]].copy_(tensor)


def _write_shard(param: DTensor, tensor: torch.Tensor, row: int | None) -> None:
    """Every rank has the whole tensor: each keeps its slice, nothing is sent."""
    tensor = tensor.to(dtype=param.dtype, device=param.device)
    if row is None:
        _same_shape(tensor, param)
        sharded = distribute_tensor(tensor, param.device_mesh, param.placements, src_data_rank=None)
        param.copy_(sharded)
        return
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        param.shape, param.device_mesh, param.placements
    )
    mine = row - offset[0]
    if 0 <= mine < shape[0]:
        here = [slice(o, o + n) for o, n in zip(offset[1:], shape[1:], strict=True)]
        param.to_local()[mine].copy_(tensor[tuple(here)])
