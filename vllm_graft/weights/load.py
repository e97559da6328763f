"""`load_external_weights`: stream a checkpoint into a model and account for all of it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from vllm_graft.stage import other_stages
from vllm_graft.weights.account import Account, LoadReport, Missing, missing_text
from vllm_graft.weights.errors import WeightError, nearest
from vllm_graft.weights.fp8 import SUFFIX, Halves, check_scale, is_block_fp8
from vllm_graft.weights.mapped import MappedFiles
from vllm_graft.weights.mapping import NameMap, NameMapping, Place
from vllm_graft.weights.reading import Reading
from vllm_graft.weights.shards import is_share, rows_of
from vllm_graft.weights.slots import Slot, slots, tensor_in, tied_names
from vllm_graft.weights.write import check, holds, put, wide_float

logger = logging.getLogger("vllm_graft")

__all__ = ["Load", "LoadReport", "LoadResult", "Missing", "WeightError", "load_external_weights"]


class LoadResult(tuple[int, int]):
    """`(loaded, skipped)` counts, with the whole account in `report`."""

    report: LoadReport

    def __new__(cls, report: LoadReport) -> LoadResult:
        """The counts of `report`."""
        self = super().__new__(cls, (len(report.loaded), len(report.skipped)))
        self.report = report
        return self


class Load:
    """One load of a model, in one call of `load_external_weights` or in many.

    Args:
        names: one name for every slot of the whole model, from `tied_names`.
    """

    _running: Load | None = None

    def __init__(self, names: dict[Slot, str]) -> None:
        self.account = Account(names)
        self.halves = Halves()
        self.files = MappedFiles()
        self.reports: list[LoadReport] = []
        self._loaders: list[_Loader] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Calls in the block belong to this load and may leave parameters out.

        Whoever opens the block asks `errors()` once the last call is through.
        """
        before, Load._running = Load._running, self
        try:
            yield
        finally:
            Load._running = before

    def loader(self, model: nn.Module, mapping: NameMapping) -> _Loader:
        """The loader for a model and mapping; kept, since vLLM may call once per tensor."""
        for known in self._loaders:
            if known.model is model and known.mapping == dict(mapping):
                return known
        self._loaders.append(_Loader(model, mapping, self))
        return self._loaders[-1]

    def mappings(self) -> list[tuple[nn.Module, NameMapping]]:
        """What `load_external_weights` was called with in this load: models and mappings."""
        return [(loader.model, loader.mapping) for loader in self._loaders]

    def report(self) -> LoadReport:
        """The reports of all calls as one."""
        total = LoadReport()
        for report in self.reports:
            total.loaded |= report.loaded
            total.skipped += report.skipped
            total.dropped += report.dropped
            total.elsewhere += report.elsewhere
            total.numel += report.numel
        return total

    def errors(self, missing: list[Missing]) -> list[str]:
        """What a complete load must not have: unpaired FP8 halves, and `missing`."""
        lines = self.halves.unpaired()
        if missing:
            lines.append(missing_text(missing, self.report().skipped))
        return lines


def load_external_weights(
    model: nn.Module,
    weights_iter: Iterable[tuple[str, torch.Tensor]],
    name_mapping: NameMapping,
    verbose: bool = False,
) -> LoadResult:
    """Copy checkpoint tensors into a model's parameters, one at a time.

    Args:
        model: plain or DTensor parameters; a parameter's own `weight_loader` is
            used where it has one.
        weights_iter: `(checkpoint name, full tensor)`; consumed as a stream, so
            only one tensor is held at a time. Values are converted to the
            parameter's dtype. Block FP8 (`X` in float8_e4m3fn with a float32
            `X_scale_inv` per 128x128 block) is dequantized; a half waits for the other.
        name_mapping: checkpoint name to model name. Each `{}` stands for a
            number (layer, expert), several per name allowed. A target that ends in
            `[{}]` is a row of dim 0, one expert of a stack. `RowOrder` reorders
            rows, `Rows` fills some rows of a fused parameter. None drops the tensor
            on purpose, and there the name may contain `*` for any text. Entries are tried
            in order, after exact names. On a pipeline stage it is the mapping of the
            whole model: what belongs in the place of an `OtherStage` is left to that stage.
        verbose: print the report.

    Returns:
        `(loaded, skipped)`: tensors written, and tensors that the mapping does
        not name. Its `report` lists every name.

    Raises:
        TypeError: `weights_iter` is a mapping, not pairs.
        WeightError: a mapping that names no parameter, different shapes, a row
            out of range, a quantized tensor without a scale for a floating-point
            parameter, a parameter or row loaded twice, or one left without a
            value (buffers too, if the mapping names them). In vLLM's load and update
            calls the checks for completeness come when the whole load is through.
    """
    if isinstance(weights_iter, Mapping):
        raise TypeError("weights_iter must yield (name, tensor) pairs; pass state_dict.items()")
    load = Load._running or Load(tied_names(model))
    loader = load.loader(model, name_mapping)
    report = LoadReport()
    load.reports.append(report)
    for name, tensor in weights_iter:
        loader.take(name, tensor, report)
    whole = load is not Load._running
    missing = load.account.missing() if whole else []
    report.missing = [str(gap) for gap in missing]
    if verbose:
        print(report)  # noqa: T201 - what `verbose` is for
    if whole and (errors := load.errors(missing)):
        raise WeightError("\n".join(errors))
    return LoadResult(report)


class _Loader:
    """A model and its mapping, for the calls of one load."""

    def __init__(self, model: nn.Module, mapping: NameMapping, load: Load) -> None:
        self.model = model
        self.mapping = dict(mapping)
        self._names = NameMap(mapping)
        self._slots = slots(model)
        self._load = load
        self._other_stages = tuple(f"{place}." for place in other_stages(model))
        self._names.check_targets(self._slots, self._other_stages)
        tensors = [tensor_in(slot) for slot in self._slots.values()]
        self._is_part = bool(self._other_stages) or any(map(is_share, tensors))
        parameters = {id(p) for p in model.parameters()}
        for name, slot in self._slots.items():
            tensor = tensor_in(slot)
            size = rows_of(tensor)
            key = load.account.name_of(slot, name)
            required = id(tensor) in parameters
            load.account.open(key, size, name, self._names, required=required)

    def take(self, name: str, tensor: torch.Tensor, report: LoadReport) -> None:
        """Place one checkpoint tensor, or note why it has no place."""
        self._is_mapped(tensor)  # Those that this rank leaves out are not read ahead either.
        place, weight_name = self._names(name), name
        is_scale = name.endswith(SUFFIX) and (place is None or place.target is None)
        if is_scale:
            # A scale goes where its weight goes, unless an earlier entry drops it.
            weight_name = name.removesuffix(SUFFIX)
            place = self._names(name, weight_name)
        if place is None:
            report.skipped.append(name)
        elif place.target is None:
            report.dropped.append(name)
        elif place.target.startswith(self._other_stages):
            report.elsewhere.append(name)
        elif place.target not in self._slots:
            raise WeightError(
                f"checkpoint tensor {name!r} maps to {place.target!r}, which the model does not "
                f"have; {nearest(place.target, self._slots)}"
            )
        elif is_scale and not wide_float(tensor_in(self._slots[place.target])):
            report.skipped.append(name)
        else:
            self._place(weight_name, tensor, place, is_scale, report)

    def _place(
        self, name: str, tensor: torch.Tensor, place: Place, is_scale: bool, report: LoadReport
    ) -> None:
        param, scale = tensor_in(self._slots[str(place.target)]), None
        if is_scale or (is_block_fp8(tensor) and wide_float(param)):
            halves = self._load.halves.add(name, tensor, is_scale=is_scale)
            if halves is None:
                return
            tensor, scale = halves
            check_scale(name, tensor, scale)
            report.loaded[name + SUFFIX] = str(place)
        reading = Reading(place.order, scale, mapped=self._is_mapped(tensor))
        self._write(name, tensor, place, reading)
        report.loaded[name] = str(place)
        report.numel += tensor.numel()

    def _is_mapped(self, tensor: torch.Tensor) -> bool:
        """Whether parts of `tensor` are to be read from a mapped file."""
        return self._is_part and self._load.files.holds(tensor)

    def _write(self, name: str, tensor: torch.Tensor, place: Place, reading: Reading) -> None:
        account, target = self._load.account, str(place.target)
        slot = self._slots[target]
        param, key = tensor_in(slot), account.name_of(slot, target)
        where = f"checkpoint tensor {name!r} -> parameter {str(place)!r}"
        check(where, tensor, param, place.row, reading)
        before = account.earlier(key, place.row)
        if before is None:
            put(where, tensor, param, place.row, reading)
            account.note(key, place.row, name, target)
            logger.debug("%s %s", where, tuple(tensor.shape))
        elif before[1] == target:
            raise WeightError(f"{where}: it was already loaded from {before[0]!r}")
        elif not holds(param, tensor, place.row, reading):
            raise WeightError(
                f"{where}: it was already loaded from {before[0]!r} as {before[1]!r} (tied), "
                "other values"
            )
