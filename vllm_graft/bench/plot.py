"""The report as a picture: tokens per second by batch size, beside what the machine allows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_graft.bench.report import LABELS


def draw(report: dict[str, Any], path: Path) -> None:
    """Write a PNG with a panel for prefill and one for decode.

    Args:
        report: of `report.as_json`.
        path: of the picture.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, phase in zip(figure.subplots(1, 2), ("prefill", "decode"), strict=True):
        _panel(axes, report, phase)
    mode = "eager" if report["settings"]["enforce_eager"] else "compiled"
    figure.suptitle(f"{report['settings']['checkpoint']}, {report['settings']['dtype']}, {mode}")
    figure.savefig(path, dpi=130)


def _panel(axes: Any, report: dict[str, Any], phase: str) -> None:
    names, batches = list(report["contenders"]), list(report["ceilings"]["limits"])
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        rates = [report["contenders"][name]["batches"][batch][phase] for batch in batches]
        places = [at + (index - (len(names) - 1) / 2) * width for at in range(len(batches))]
        bars = axes.bar(places, rates, width, label=LABELS[name])
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    for at, limit in enumerate(report["ceilings"]["limits"].values()):
        if limit[phase] is not None:
            label = "the machine's limit" if at == 0 else None
            axes.hlines(limit[phase], at - 0.45, at + 0.45, "black", "dashed", label=label)
    axes.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
    axes.set_title(phase)
    axes.set_ylabel("tokens/s")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
