"""What the doctor found. Torch only."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_graft.doctor.compare import Agreement, Divergence, first
from vllm_graft.doctor.diagnose import Diagnosis
from vllm_graft.doctor.gradients import Gradient


@dataclass(frozen=True)
class Report:
    """What the doctor found."""

    paths: tuple[Agreement, ...]
    spots: tuple[Divergence, ...]
    gradients: tuple[Gradient, ...]
    diagnoses: tuple[Diagnosis, ...]
    reference: str
    seconds: float

    @property
    def healthy(self) -> bool:
        """Whether every path and every gradient agrees with the reference."""
        paths = all(each.healthy for each in self.paths)
        return paths and all(each.healthy for each in self.gradients)

    @property
    def first(self) -> Divergence | None:
        """Where the port leaves the reference."""
        return first(list(self.spots))
