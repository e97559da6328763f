"""Medians, ratios, the JSON report and the table on screen."""

from __future__ import annotations

from datetime import UTC, datetime
from statistics import median
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

from vllm_graft.bench.machine import machine, versions
from vllm_graft.bench.spec import GRAFT, Measured, Workload

SCHEMA = 1
QUIET = 0.1
"""Part of the machine that others may use before the report warns."""


def as_json(
    results: list[Measured], workload: Workload, settings: dict[str, Any]
) -> dict[str, Any]:
    """The whole report: medians, ratios, every round, and how it was made.

    Args:
        results: Graft first.
        workload: that was measured.
        settings: flags worth recording (checkpoint, dtype, eager or compiled).
    """
    graft, *peers = results
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": settings,
        "workload": vars(workload),
        "machine": machine(),
        "versions": versions(),
        "contenders": {r.contender.name: summary(r, workload) for r in results},
        "ratios": {peer.contender.name: ratios(graft, peer, workload) for peer in peers},
    }


def summary(result: Measured, workload: Workload) -> dict[str, Any]:
    """Medians and rounds of one contender: tokens/s, seconds, GiB."""
    rounds = [
        {
            "prefill_s": r.prefill_s,
            "total_s": r.total_s,
            "prefill": r.prefill_rate(workload),
            "decode": r.decode_rate(workload),
            "other_load": r.other_load,
        }
        for r in result.rounds
    ]
    return {
        "prefill": median(r["prefill"] for r in rounds),
        "decode": median(r["decode"] for r in rounds),
        "cold_startup_s": result.cold_startup_s,
        "startup_s": result.startup_s,
        "engine_s": result.engine_s,
        "other_load": median(r["other_load"] for r in rounds),
        "peak_rss_gib": result.peak_rss_gib,
        "rss_gib": result.rss_gib,
        "rounds": rounds,
    }


def ratios(graft: Measured, peer: Measured, workload: Workload) -> dict[str, float]:
    """Graft over peer. Rates are paired round by round, then the median is taken.

    Above 1 Graft is faster in `prefill` and `decode`, and slower or larger in
    `cold_startup`, `startup` and `peak_memory`. `same_first_token` is the share of sequences
    whose first greedy token agrees.
    """
    pairs = list(zip(graft.rounds, peer.rounds, strict=True))
    tokens = [
        mine == theirs
        for g, p in pairs
        for mine, theirs in zip(g.first_tokens, p.first_tokens, strict=True)
    ]
    return {
        "prefill": median(p.prefill_s / g.prefill_s for g, p in pairs),
        "decode": median(g.decode_rate(workload) / p.decode_rate(workload) for g, p in pairs),
        "cold_startup": graft.cold_startup_s / peer.cold_startup_s,
        "startup": graft.startup_s / peer.startup_s,
        "peak_memory": graft.peak_rss_gib / peer.peak_rss_gib,
        "same_first_token": sum(tokens) / len(tokens),
    }


_LABELS = {
    GRAFT: "Graft",
    "vllm": "vLLM",
    "transformers": "Transformers",
    "graft-fast": "Graft, not exact",
}
_RATIOS = ("prefill", "decode", "cold_startup", "startup", "peak_memory")


def tables(report: dict[str, Any]) -> Group:
    """The report for a terminal."""
    parts: list[Table | str] = [_figures(report)]
    if report["ratios"]:
        parts.append(_ratios(report))
    load = max(row["other_load"] for row in report["contenders"].values())
    if load > QUIET:
        parts.append(
            f"Other processes used {load:.0%} of the machine during the rounds: the ratios are "
            "less certain, and tokens/s and start times are worse than on a quiet machine."
        )
    return Group(*parts)


def _figures(report: dict[str, Any]) -> Table:
    work = report["workload"]
    mode = "eager" if report["settings"]["enforce_eager"] else "compiled"
    table = _table(
        f"{mode}, {report['settings']['dtype']}, {work['batch_size']} sequences of "
        f"{work['prompt_len']} + {work['output_len']} tokens, median of {work['rounds']} rounds",
        ("", "prefill tok/s", "decode tok/s", "first start s", "start s", "memory GiB"),
    )
    for name, row in report["contenders"].items():
        table.add_row(
            _LABELS[name],
            f"{row['prefill']:.0f}",
            f"{row['decode']:.1f}",
            f"{row['cold_startup_s']:.1f}",
            f"{row['startup_s']:.1f}",
            f"{row['peak_rss_gib']:.2f}",
        )
    return table


def _ratios(report: dict[str, Any]) -> Table:
    titles = ("Graft over", *(key.replace("_", " ") for key in _RATIOS), "same first token")
    table = _table("", titles)
    for name, row in report["ratios"].items():
        figures = (f"{row[key]:.2f}" for key in _RATIOS)
        table.add_row(_LABELS[name], *figures, f"{row['same_first_token']:.0%}")
    return table


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title or None, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table
