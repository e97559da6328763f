"""`WeightPlan`: what the solver proposes, what people edit, and what loads a checkpoint."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from vllm_graft.weights.errors import WeightError
from vllm_graft.weights.fp8 import is_block_fp8
from vllm_graft.weights.load import LoadReport, load_external_weights
from vllm_graft.weights.mapping import NameMap, NameMapping
from vllm_graft.weights.rows import RowOrder, Rows
from vllm_graft.weights.shards import shard_of
from vllm_graft.weights.slots import slots, tensor_in
from vllm_graft.weights.solve.line import Line

_VERSION = 1


@dataclass(frozen=True)
class WeightPlan:
    """How the tensors of a checkpoint become a model's parameters, line by line.

    A plan is a name mapping for `load_external_weights`. Where a checkpoint tensor has to
    be taken apart or transposed first, `read` does it to the stream, and gives the pieces
    names of their own: the tensor's, `:` and a number.
    """

    lines: tuple[Line, ...]
    checked: str | None = None
    """What a comparison with a reference model gave; None: there was none."""

    @cached_property
    def name_mapping(self) -> NameMapping:
        """For `load_external_weights` and `export_weights`, of what `read` yields."""
        cut = {line for lines in self._cut.values() for _, line in lines}
        names: dict[str, str | RowOrder | Rows | None] = {
            line.source: line.value(whole=True) for line in self.lines if line not in cut
        }
        for lines in self._cut.values():
            names |= {name: line.value(whole=False) for name, line in lines}
        return names

    def read(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors that `name_mapping` names, in the order of the checkpoint.

        Args:
            weights: `(checkpoint name, tensor)`; one that needs no cut passes as it is.

        Raises:
            WeightError: a block FP8 tensor that has to be cut: its scale comes apart from it.
        """
        cut = NameMap({tensor: tensor for tensor in self._cut})
        tensors = {entry.source: entry for entry in cut.entries}
        for name, tensor in weights:
            pattern = next((p for p, entry in tensors.items() if entry.place(name)), None)
            if pattern is None:
                yield name, tensor
                continue
            if is_block_fp8(tensor):
                raise WeightError(
                    f"checkpoint tensor {name!r} is block FP8 and the plan cuts it; "
                    "dequantize the checkpoint first"
                )
            for piece, line in self._cut[pattern]:
                yield from _pieces(name, piece.removeprefix(line.source), line, tensor)

    def cuts(self, name: str) -> bool:
        """Whether checkpoint tensor `name` is taken apart or transposed."""
        return NameMap({tensor: tensor for tensor in self._cut})(name) is not None

    def load(self, model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> LoadReport:
        """Load a checkpoint by this plan.

        Raises:
            WeightError: as `load_external_weights`, for tensors that no line names, and for a
                fused parameter of which this rank holds a share.
        """
        self._check_ranks(model)
        report = load_external_weights(model, self.read(weights), self.name_mapping).report
        if report.skipped:
            raise WeightError(
                f"no line of the plan names {len(report.skipped)} checkpoint tensors: "
                f"{', '.join(report.skipped[:8])}"
            )
        return report

    def _check_ranks(self, model: nn.Module) -> None:
        # Megatron's gate and up: each rank has a share of both, so the rows depend on the ranks.
        fused = [entry for entry in NameMap(self.name_mapping).entries if entry.part is not None]
        for name, slot in slots(model).items():
            shard = shard_of(tensor_in(slot))
            if shard and shard.count > 1 and any(entry.rows(name, 1) for entry in fused):
                raise WeightError(
                    f"parameter {name!r} is sharded over {shard.count} ranks and the plan fills "
                    "rows of it, counted for one; load it on one rank, or by a mapping of your own"
                )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, which `load_weight_plan` reads."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """One line of text for each line of the plan."""
        lines = ",\n".join(f"    {json.dumps(line.to_json())}" for line in self.lines)
        checked = json.dumps(self.checked)
        head = f'"version": {_VERSION},\n  "checked": {checked}'
        return f'{{\n  {head},\n  "lines": [\n{lines}\n  ]\n}}\n'

    @cached_property
    def _cut(self) -> dict[str, list[tuple[str, Line]]]:
        """By checkpoint pattern, the lines that cut it, and what the mapping calls the pieces."""
        uses = Counter(line.tensor for line in self.lines)
        found: dict[str, list[tuple[str, Line]]] = {}
        for line in self.lines:
            if line.cuts or uses[line.tensor] > 1:
                pieces = found.setdefault(line.tensor, [])
                pieces.append((f"{line.source}:{len(pieces)}", line))
        return found


def _pieces(
    name: str, number: str, line: Line, tensor: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    if line.source == line.tensor:
        yield name + number, line.cut(tensor)
        return
    for at, row in enumerate(tensor.unbind()):
        yield f"{name}[{at}]{number}", line.cut(row)


def load_weight_plan(path: str | os.PathLike[str]) -> WeightPlan:
    """The plan in a JSON file, as `WeightPlan.save` or an editor left it.

    Raises:
        WeightError: not such a file; names the line.
    """
    where = os.fspath(path)
    try:
        made = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(made, dict) or made.get("version") != _VERSION:
        raise WeightError(f'{where}: expected a weight plan with "version": {_VERSION}')
    lines = [
        Line.of_json(line, f"{where}, line {at} of the plan")
        for at, line in enumerate(made.get("lines", []))
    ]
    plan = WeightPlan(tuple(lines), made.get("checked"))
    NameMap(plan.name_mapping)
    return plan
