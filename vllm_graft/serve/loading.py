"""Loads into a served model: the initial one, live updates, and writes into weights in use.

What is written is known from three sources, since a user's `load_weights` may write in any
way: the account of `load_external_weights`, the rows that went through a
`weight_loader`, and NaN marks for everything else.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import nn

from vllm_graft.weights.account import LoadReport, Missing
from vllm_graft.weights.load import Load, WeightError
from vllm_graft.weights.mapping import NameMapping
from vllm_graft.weights.rows import Part
from vllm_graft.weights.sentinel import Sentinels
from vllm_graft.weights.shards import rows_of
from vllm_graft.weights.slots import slots, tensor_in, tied_names
from vllm_graft.weights.write import note_writes

logger = logging.getLogger("vllm_graft")

_SHOWN = 8


class Loading:
    """Whether all weights of a served model have been written, and so may be served.

    Built before vLLM first sees the model's tensors: a reload works on copies of their
    attributes.
    """

    def __init__(self, arch: str, model: nn.Module) -> None:
        self.refusal: str | None = None
        """Why the model must not be served: a load broke off or left something out."""
        self.report = LoadReport()
        """Where the tensors of the last whole load went."""
        self.mappings: list[tuple[nn.Module, NameMapping]] = []
        """The modules of that load and their name mappings."""
        self.closed = False
        """Whether no further load can come."""
        self._arch = arch
        self._model = model
        self._names = tied_names(model)
        self._tensors: dict[str, torch.Tensor] = {}
        for slot, name in self._names.items():
            self._tensors.setdefault(name, tensor_in(slot))
        self._parameters: dict[str, torch.Tensor] = dict(model.named_parameters())
        self._sentinels: Sentinels | None = None
        self._load = Load(self._names)
        self._deferred: set[str] = set()
        self._kept: dict[str, torch.Tensor] = {}
        self._complete_once = False
        for tensor in self._tensors.values():
            note_writes(tensor)

    def take(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str] | None:
        """Let the user's module load, and learn what was written.

        vLLM may call this once with everything or once per tensor. Returns the
        written parameters as soon as all are; None says "not complete", and the
        account is then settled in `finish`.
        """
        self._begin()
        load = Load(self._names) if self._sentinels is None else self._load
        try:
            with load.running():
                self._model.load_weights(weights)  # type: ignore[operator]
            errors = load.errors([]) if self._sentinels is None else []
            if errors:
                raise WeightError("\n".join(errors))
        except Exception as error:
            self.give_up(f"loading weights failed: {error}")
            raise
        if self._sentinels is None or self._missing(self._sentinels.unwritten()):
            return None
        return set(self._parameters)

    def finish(self) -> bool:
        """Settle the account of a whole load; returns whether it was the first.

        Raises:
            WeightError: something is missing, now or since an earlier load.
        """
        if self._sentinels is not None:
            unwritten = self._sentinels.unwritten()
            self._stop_marking()
            self.report = self._load.report()
            self.mappings = self._load.mappings()
            self._tell(self.report)
            self.refusal = self._verdict(unwritten)
            self._load = Load(self._names)
        if self.refusal is not None:
            raise WeightError(f"{self._arch}: {self.refusal}")
        first, self._complete_once = not self._complete_once, True
        return first

    def close(self) -> None:
        """Take no further load, and hold none of the tensors that were loaded."""
        self.closed = True
        self._tensors, self._parameters, self._names = {}, {}, {}
        self._load = Load({})

    def _tell(self, report: LoadReport) -> None:
        logger.info("%s: %s", self._arch, str(report).splitlines()[0])
        if report.skipped:
            # A bias or an expert that the model was built without is skipped as well.
            logger.warning(
                "%s: %d checkpoint tensors are not served, since name_mapping does not name them: "
                "%s%s (map them to None if that is meant)",
                self._arch, len(report.skipped), ", ".join(report.skipped[:_SHOWN]),
                ", ..." if len(report.skipped) > _SHOWN else "",
            )  # fmt: skip

    def _begin(self) -> None:
        """Open the initial load or a layerwise update, unless it is open.

        A layerwise update has put tensors on meta, so no request can read
        the marked storage. Any other later call writes to weights in use:
        those are not marked.
        """
        if self._sentinels is not None:
            return
        on_meta = {
            self._names.get(slot, name)
            for name, slot in slots(self._model).items()
            if tensor_in(slot).is_meta
        }
        if self._complete_once and not on_meta:
            return
        self._sentinels = Sentinels(self._parameters)
        self._load = Load(self._names)
        for tensor in self._tensors.values():
            _rows_written(tensor).clear()
        self._deferred = {n for n in on_meta if hasattr(self._tensors.get(n), "rows_written")}
        buffers = self._deferred - self._parameters.keys()
        self._kept = {name: self._tensors[name].clone() for name in buffers}

    def give_up(self, reason: str) -> None:
        """Refuse to serve, since the weights may be a mixture, until a whole load has come."""
        self.refusal = reason
        self._stop_marking()

    def _stop_marking(self) -> None:
        if self._sentinels is not None:
            self._sentinels.remove()
            self._sentinels = None
        # vLLM leaves uninitialized memory in a buffer that was not in the update.
        for name, value in self._kept.items():
            if not _rows_written(self._tensors[name]):
                self._tensors[name].copy_(value)
        self._kept = {}

    def _missing(self, unwritten: dict[str, str]) -> list[Missing]:
        gaps: list[Missing] = []
        for name, tensor in self._tensors.items():
            rows = self._rows(name)
            if rows or self._untouched(name, unwritten):
                gaps += self._load.account.gaps(name, rows_of(tensor), rows)
        return gaps

    def _rows(self, name: str) -> set[Part]:
        return self._load.account.rows(name) | _rows_written(self._tensors[name])

    def _untouched(self, name: str, unwritten: dict[str, str]) -> bool:
        """Whether a tensor that no account knows of has no value.

        A write into a deferred parameter that went past its `weight_loader` is lost, and
        vLLM may have put uninitialized memory where the marks were.
        """
        if name in unwritten:
            return True
        if name in self._deferred and name in self._parameters:
            return True
        marked = name in self._parameters and Sentinels.can_mark(self._tensors[name])
        return not marked and self._load.account.maps(name)

    def _verdict(self, unwritten: dict[str, str]) -> str | None:
        missing = self._missing(unwritten)
        left = {gap.name for gap in missing}
        lines = self._load.errors(missing)
        nan = [name for name in unwritten if name not in left]
        if nan:
            lines.append(f"the checkpoint has NaN values in {', '.join(nan)}")
        partly = [n for n in left if unwritten.get(n, "missing") != "missing" and not self._rows(n)]
        if partly:
            lines.append(f"only partly written: {', '.join(sorted(partly))}")
        return "\n".join(lines) or None


def _rows_written(tensor: torch.Tensor) -> set[Part]:
    """What `write` noted for a tensor; nothing where a loader of its own writes."""
    rows: set[Part] = getattr(tensor, "rows_written", set())
    return rows
