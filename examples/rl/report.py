"""What a run shows and leaves: a live table, `metrics.jsonl`, `training.png`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

SHOWN = 10
"""Steps in the live table."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One line of `metrics.jsonl`."""

    step: int
    reward: float
    """Mean over all completions."""
    loss: float
    kl: float
    """Between engine and trainer, nats per token."""
    unequal: int
    """Sampled tokens whose log-probability differs between the two."""
    tokens: int
    """Sampled tokens."""
    tokens_per_second: float
    """Sampled tokens over the time of the whole step: rollout, training, comparison."""
    seconds: float


class Report:
    """Takes up steps, shows the last ones, and writes each at once.

    Args:
        folder: where `metrics.jsonl` goes.
        steps: how many are to come.
        console: where the table lives.
    """

    def __init__(self, folder: Path, steps: int, console: Console) -> None:
        self.steps: list[Step] = []
        self._file = (folder / "metrics.jsonl").open("w", encoding="utf-8")
        self._progress = progress_bar(console)
        self._task = self._progress.add_task("GRPO", total=steps, note="")
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> Report:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()
        if not self._live.console.is_interactive:
            # The last table has no end of line there.
            self._live.console.print()
        self._file.close()

    def add(self, step: Step) -> None:
        """Write one step and show it."""
        self.steps.append(step)
        self._file.write(json.dumps(asdict(step)) + "\n")
        self._file.flush()
        self._progress.update(self._task, advance=1, note=f"reward {step.reward:.2f}")

    def _render(self) -> Group:
        return Group(self._progress, table(self.steps[-SHOWN:]))


def table(steps: Sequence[Step]) -> Table:
    """Steps as a table."""
    shown = Table()
    for heading in ("step", "reward", "loss", "KL engine/trainer", "tokens/s", "seconds"):
        shown.add_column(heading, justify="right")
    for s in steps:
        shown.add_row(
            f"{s.step}", f"{s.reward:.3f}", f"{s.loss:+.4f}", f"{s.kl:.3g}",
            f"{s.tokens_per_second:,.0f}", f"{s.seconds:.2f}",
        )  # fmt: skip
    return shown


def progress_bar(console: Console) -> Progress:
    """Name, bar, count, a note and the time."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        console=console,
    )


def plot(steps: Sequence[Step], path: Path) -> None:
    """Draw reward and KL of each step into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    reward, kl = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    x = [s.step for s in steps]
    reward.plot(x, [s.reward for s in steps], color="tab:blue")
    reward.set(ylabel="mean reward", ylim=(0, 1), title="GRPO on sums")
    kl.plot(x, [s.kl for s in steps], color="tab:red")
    kl.set(ylabel="KL engine/trainer\n(nats per token)", xlabel="step")
    for axes in (reward, kl):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
