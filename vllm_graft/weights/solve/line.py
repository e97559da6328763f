"""One line of a weight plan: a checkpoint tensor, or some of it, and its place in the model."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from vllm_graft.weights.errors import WeightError
from vllm_graft.weights.rows import RowOrder, Rows
from vllm_graft.weights.solve.numbers import rows_of_text, rows_text
from vllm_graft.weights.solve.rope import Rope

_STACK = "[{}]"


@dataclass(frozen=True)
class Line:
    """Where a checkpoint tensor goes, and by what it was decided."""

    source: str
    """Checkpoint name with `{}` for numbers; with `[{}]` at its end, each row of dim 0 (an
    expert of a stack) by itself."""
    target: str | None
    """Model name, as a value of `name_mapping`; None: waived."""
    by: str
    """What decided: names, shapes, numbers, or why a tensor is waived."""
    transposed: bool = False
    """Swap the last two dimensions, before rows are taken."""
    take: tuple[int, ...] | None = None
    """Rows (dim 0) of the checkpoint's tensor, in this order; None: all."""
    rope: Rope | None = None
    """The other RoPE order of what was taken."""
    put: tuple[int, ...] | None = None
    """Rows (dim 0) of the model's tensor that it becomes; None: all."""

    @property
    def tensor(self) -> str:
        """The pattern of the checkpoint's tensor."""
        return self.source.removesuffix(_STACK)

    @property
    def cuts(self) -> bool:
        """Whether a part or a view of the tensor is wanted, which no name mapping can say."""
        return self.source.endswith(_STACK) or self.transposed or self.take is not None

    def value(self, *, whole: bool) -> str | RowOrder | Rows | None:
        """The line as a value of `name_mapping`.

        Args:
            whole: the loader gets the tensor as the checkpoint has it, not what `cut` made.
        """
        order = self.rope.order() if self.rope and whole else None
        if self.target is None or (order is None and self.put is None):
            return self.target
        if order is None:
            return Rows(self.target, self.put or ())
        if self.put is None:
            return RowOrder(self.target, order)
        # Checkpoint row order[i] is row put[i] of the model.
        rows = dict(zip(order, self.put, strict=True))
        return Rows(self.target, [rows[at] for at in range(len(order))])

    def cut(self, tensor: torch.Tensor) -> torch.Tensor:
        """What this line takes of `tensor` (one row of a stack already): `[rows, ...]`."""
        if self.transposed:
            tensor = tensor.mT
        rows = self._rows(tensor.shape[0])
        return tensor if rows is None else tensor[list(rows)]

    def _rows(self, size: int) -> tuple[int, ...] | None:
        if self.rope is None:
            return self.take
        taken = self.take or tuple(range(size))
        return tuple(taken[at] for at in self.rope.order())

    def to_json(self) -> dict[str, Any]:
        """Readable and editable; what is not needed is left out."""
        made: dict[str, Any] = {"from": self.source, "to": self.target}
        if self.transposed:
            made["transposed"] = True
        if self.take is not None:
            made["take"] = rows_text(self.take)
        if self.rope is not None:
            made["rope"] = self.rope.to_json()
        if self.put is not None:
            made["put"] = rows_text(self.put)
        return made | {"by": self.by}

    @classmethod
    def of_json(cls, made: dict[str, Any], where: str) -> Line:
        """The line that `to_json` wrote.

        Raises:
            WeightError: begins with `where`: unknown or missing keys.
        """
        known = {"from", "to"} | {f.name for f in fields(cls)} - {"source", "target"}
        wrong = set(made) - known
        if wrong or not {"from", "to"} <= set(made):
            raise WeightError(
                f"{where}: expected from, to and of {sorted(known - {'from', 'to'})}, "
                f"got {sorted(made)}"
            )
        return cls(
            source=made["from"],
            target=made["to"],
            by=made.get("by", "hand"),
            transposed=bool(made.get("transposed", False)),
            take=rows_of_text(made["take"]) if "take" in made else None,
            rope=Rope(**made["rope"]) if "rope" in made else None,
            put=rows_of_text(made["put"]) if "put" in made else None,
        )
