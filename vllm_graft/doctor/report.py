"""What the doctor found. Torch only."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_graft.doctor.compare import Agreement, Divergence, first
from vllm_graft.doctor.diagnose import Diagnosis
from vllm_graft.doctor.gradients import Gradient
from vllm_graft.doctor.sides import LeftOut


@dataclass(frozen=True)
class Report:
    """What the doctor found."""

    paths: tuple[Agreement, ...]
    spots: tuple[Divergence, ...]
    gradients: tuple[Gradient, ...]
    diagnoses: tuple[Diagnosis, ...]
    reference: str
    seconds: float
    left_out: tuple[LeftOut, ...] = ()

    @property
    def healthy(self) -> bool:
        """Whether every path and every gradient that was compared agrees with the reference."""
        paths = all(each.healthy for each in self.paths)
        return paths and all(each.healthy for each in self.gradients)

    def leaves_out(self, what: str) -> bool:
        """Whether the report says nothing about `what`."""
        return any(each.what == what for each in self.left_out)

    @property
    def first(self) -> Divergence | None:
        """Where the port leaves the reference."""
        return first(list(self.spots))
