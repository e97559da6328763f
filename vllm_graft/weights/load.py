"""`load_external_weights`: stream a checkpoint into a model and account for all of it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vllm_graft.weights.mapping import NameMap, WeightError, nearest

logger = logging.getLogger("vllm_graft")

__all__ = ["LoadReport", "LoadResult", "WeightError", "accounting_later", "load_external_weights"]


@dataclass
class LoadReport:
    """Where every checkpoint tensor and every model parameter ended up."""

    loaded: dict[str, str] = field(default_factory=dict)
    """Checkpoint name to the parameter it was written to."""
    skipped: list[str] = field(default_factory=list)
    """Checkpoint names that the mapping does not name."""
    dropped: list[str] = field(default_factory=list)
    """Checkpoint names that the mapping drops on purpose (maps to None)."""
    missing: list[str] = field(default_factory=list)
    """Parameters left without a value."""
    numel: int = 0
    """Numbers written."""
    written: set[int] = field(default_factory=set, repr=False)
    """`id` of each parameter object written to."""

    def __str__(self) -> str:
        lines = [
            f"{len(self.loaded)} tensors loaded ({self.numel:,} numbers), "
            f"{len(self.skipped)} skipped, {len(self.dropped)} dropped on purpose, "
            f"{len(self.missing)} parameters missing"
        ]
        for title, names in (("skipped", self.skipped), ("missing", self.missing)):
            lines += [f"  {title}: {name}" for name in names]
        return "\n".join(lines)


class LoadResult(tuple[int, int]):
    """`(loaded, skipped)` counts, with the whole account in `report`."""

    report: LoadReport

    def __new__(cls, report: LoadReport) -> LoadResult:
        """The counts of `report`."""
        self = super().__new__(cls, (len(report.loaded), len(report.skipped)))
        self.report = report
        return self


class _Accounting:
    later: list[LoadReport] | None = None


@contextmanager
def accounting_later() -> Iterator[list[LoadReport]]:
    """Let calls in the block leave parameters out; their reports are collected.

    For a load that comes in several calls: whoever opens the block checks that
    nothing is missing once the last call is through.
    """
    before, reports = _Accounting.later, list[LoadReport]()
    _Accounting.later = reports
    try:
        yield reports
    finally:
        _Accounting.later = before


def load_external_weights(
    model: nn.Module,
    weights_iter: Iterable[tuple[str, torch.Tensor]],
    name_mapping: Mapping[str, str | None],
    verbose: bool = False,
) -> LoadResult:
    """Copy checkpoint tensors into a model's parameters, one at a time.

    Args:
        model: plain or DTensor parameters; a parameter's own `weight_loader` is
            used where it has one.
        weights_iter: `(checkpoint name, full tensor)`; consumed as a stream, so
            only one tensor is held at a time. Values are converted to the
            parameter's dtype.
        name_mapping: checkpoint name to model name. Each `{}` stands for a
            number (layer, expert), several per name allowed; None drops the
            tensor on purpose.
        verbose: print the report.

    Returns:
        `(loaded, skipped)`: tensors written, and tensors that the mapping does
        not name. Its `report` lists every name.

    Raises:
        TypeError: `weights_iter` is a mapping, not pairs.
        WeightError: a mapping that names no parameter, different shapes, a
            quantized tensor for a floating-point parameter, a parameter loaded
            twice, or one left without a value. In vLLM's load and update calls
            the last check comes when the whole load is complete.
    """
    if isinstance(weights_iter, Mapping):
        raise TypeError("weights_iter must yield (name, tensor) pairs; pass state_dict.items()")
    loader = _Loader(model, NameMap(name_mapping))
    for name, tensor in weights_iter:
        loader.take(name, tensor)
    report = loader.report
    if verbose:
        print(report)  # noqa: T201 - what `verbose` is for
    if _Accounting.later is not None:
        _Accounting.later.append(report)
    elif report.missing:
        raise WeightError(missing_text(report.missing, report.skipped))
    return LoadResult(report)


def missing_text(missing: list[str], skipped: list[str]) -> str:
    """The error for parameters without a value, with what the checkpoint offers instead."""
    count = "1 parameter was" if len(missing) == 1 else f"{len(missing)} parameters were"
    lines = [f"{count} left without a value:"]
    lines += [
        f"  {name} (checkpoint tensors not mapped: {nearest(name, skipped)})" for name in missing
    ]
    return "\n".join(lines)


class _Loader:
    """The state of one call: which parameter came from which tensor."""

    def __init__(self, model: nn.Module, names: NameMap) -> None:
        self.names = names
        self.targets: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
        parameters = {id(p): name for name, p in reversed(self.targets.items())}
        self.targets |= dict(model.named_buffers(remove_duplicate=False))
        names.check_targets(self.targets)
        self._source: dict[int, tuple[str, str]] = {}
        self._parameters = parameters
        self._report = LoadReport()

    @property
    def report(self) -> LoadReport:
        """The account so far."""
        self._report.missing = [
            name for key, name in reversed(self._parameters.items()) if key not in self._source
        ]
        return self._report

    def take(self, name: str, tensor: torch.Tensor) -> None:
        """Place one checkpoint tensor, or note why it has no place."""
        mapped, target = self.names(name)
        if not mapped:
            self._report.skipped.append(name)
        elif target is None:
            self._report.dropped.append(name)
        elif target not in self.targets:
            raise WeightError(
                f"checkpoint tensor {name!r} maps to {target!r}, which the model does not have; "
                f"{nearest(target, self.targets)}"
            )
        else:
            self._write(name, tensor, target, self.targets[target])

    def _write(self, name: str, tensor: torch.Tensor, target: str, param: torch.Tensor) -> None:
        where = f"checkpoint tensor {name!r} -> parameter {target!r}"
        _check(where, tensor, param)
        if id(param) in self._source:
            first_name, first_target = self._source[id(param)]
            if first_target == target or not _same(param, tensor):
                alias = (
                    "" if first_target == target else f" as {first_target!r} (tied), other values"
                )
                raise WeightError(f"{where}: it was already loaded from {first_name!r}{alias}")
        else:
            _copy(where, param, tensor)
        self._source.setdefault(id(param), (name, target))
        self._report.loaded[name] = target
        self._report.written.add(id(param))
        self._report.numel += tensor.numel()
        logger.debug("%s %s", where, tuple(tensor.shape))


def _check(where: str, tensor: torch.Tensor, param: torch.Tensor) -> None:
    if tensor.shape != param.shape and not hasattr(param, "weight_loader"):
        hint = " (transposed?)" if tensor.shape == param.shape[::-1] else ""
        raise WeightError(
            f"{where}: shape {tuple(tensor.shape)} does not fit {tuple(param.shape)}{hint}"
        )
    quantized = tensor.element_size() == 1 or not tensor.is_floating_point()
    if param.is_floating_point() and param.element_size() > 1 and quantized:
        raise WeightError(
            f"{where}: dtype {tensor.dtype} for a {param.dtype} parameter looks quantized; "
            "dequantize it with its scale first"
        )


def _same(param: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Whether a tied parameter already holds these values (unknown on meta: taken as yes)."""
    if param.is_meta:
        return True
    full: Any = param.full_tensor() if isinstance(param, DTensor) else param
    return torch.equal(full, tensor.to(dtype=full.dtype, device=full.device))


@torch.no_grad()
def _copy(where: str, param: torch.Tensor, tensor: torch.Tensor) -> None:
    loader = getattr(param, "weight_loader", None)
    try:
        if loader is not None:
            loader(param, tensor)
        elif isinstance(param, DTensor):
            local = tensor.to(dtype=param.dtype, device=param.device)
            # Every rank has the whole tensor: each keeps its slice, nothing is sent.
            param.copy_(
                distribute_tensor(local, param.device_mesh, param.placements, src_data_rank=None)
            )
        else:
            param.copy_(tensor)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise WeightError(
            f"{where}: cannot write shape {tuple(tensor.shape)} to {tuple(param.shape)}: {error}"
        ) from error
