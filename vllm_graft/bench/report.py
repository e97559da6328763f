"""Medians, ratios, the JSON report and the table on screen."""

from __future__ import annotations

from datetime import UTC, datetime
from statistics import median
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

from vllm_graft.bench.ceilings import decode_limit, prefill_limit
from vllm_graft.bench.machine import machine, versions
from vllm_graft.bench.spec import GRAFT, Measured, Round, Workload

SCHEMA = 2
QUIET = 0.1
"""Part of the machine that others may use before the report warns."""


def as_json(
    results: list[Measured],
    workloads: list[Workload],
    settings: dict[str, Any],
    ceilings: dict[str, Any],
) -> dict[str, Any]:
    """The whole report: medians, ratios, every round, and how it was made.

    Args:
        results: Graft first.
        workloads: that were measured, one for each batch size.
        settings: flags worth recording (checkpoint, dtype, eager or compiled).
        ceilings: what `bench.ceilings` found.
    """
    graft, *peers = results
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": settings,
        "workloads": [vars(workload) for workload in workloads],
        "machine": machine(),
        "versions": versions(),
        "ceilings": {**ceilings, "limits": limits(ceilings, workloads)},
        "contenders": {r.contender.name: summary(r, workloads) for r in results},
        "ratios": {peer.contender.name: ratios(graft, peer, workloads) for peer in peers},
    }


def limits(ceilings: dict[str, Any], workloads: list[Workload]) -> dict[str, Any]:
    """Tokens/s by batch size that the machine's memory and products allow."""
    return {
        str(workload.batch_size): {
            "prefill": prefill_limit(ceilings),
            "decode": decode_limit(ceilings, workload.batch_size),
        }
        for workload in workloads
    }


def summary(result: Measured, workloads: list[Workload]) -> dict[str, Any]:
    """Starts (seconds), memory (GiB), and tokens/s by batch size of one contender."""
    return {
        "cold_startup_s": result.cold_startup_s,
        "startup_s": result.startup_s,
        "engine_s": result.engine_s,
        "peak_rss_gib": result.peak_rss_gib,
        "rss_gib": result.rss_gib,
        "python_us": result.python_us,
        "batches": {
            str(workload.batch_size): _rates(result.rounds[workload.batch_size], workload)
            for workload in workloads
        },
    }


def _rates(rounds: list[Round], workload: Workload) -> dict[str, Any]:
    """Medians and rounds at one batch size."""
    rows = [
        {
            "prefill_s": r.prefill_s,
            "total_s": r.total_s,
            "prefill": r.prefill_rate(workload),
            "decode": r.decode_rate(workload),
            "other_load": r.other_load,
        }
        for r in rounds
    ]
    medians = {key: median(row[key] for row in rows) for key in ("prefill", "decode", "other_load")}
    return {**medians, "rounds": rows}


def ratios(graft: Measured, peer: Measured, workloads: list[Workload]) -> dict[str, Any]:
    """Graft over peer.

    Above 1 Graft is faster in `prefill` and `decode`, and slower or larger in
    `cold_startup`, `startup`, `memory` (at the end) and `peak_memory`.
    """
    return {
        "cold_startup": graft.cold_startup_s / peer.cold_startup_s,
        "startup": graft.startup_s / peer.startup_s,
        "memory": graft.rss_gib / peer.rss_gib,
        "peak_memory": graft.peak_rss_gib / peer.peak_rss_gib,
        "batches": {
            str(w.batch_size): _paired(graft.rounds[w.batch_size], peer.rounds[w.batch_size], w)
            for w in workloads
        },
    }


def _paired(graft: list[Round], peer: list[Round], workload: Workload) -> dict[str, float]:
    """Rates paired round by round, then the median; the share of equal first greedy tokens."""
    pairs = list(zip(graft, peer, strict=True))
    tokens = [
        mine == theirs
        for g, p in pairs
        for mine, theirs in zip(g.first_tokens, p.first_tokens, strict=True)
    ]
    return {
        "prefill": median(p.prefill_s / g.prefill_s for g, p in pairs),
        "decode": median(g.decode_rate(workload) / p.decode_rate(workload) for g, p in pairs),
        "same_first_token": sum(tokens) / len(tokens),
    }


LABELS = {
    GRAFT: "Graft",
    "vllm": "vLLM",
    "transformers": "Transformers",
    "graft-fast": "Graft, not exact",
    "graft-training": "Graft, training",
    "graft-unpacked": "Graft, unpacked",
}


def tables(report: dict[str, Any]) -> Group:
    """The report for a terminal."""
    parts: list[Table | str] = [_speeds(report), _costs(report)]
    batches = [b for row in report["contenders"].values() for b in row["batches"].values()]
    load = max(batch["other_load"] for batch in batches)
    if load > QUIET:
        parts.append(
            f"Other processes used {load:.0%} of the machine during the rounds: the ratios are "
            "less certain, and tokens/s and start times are worse than on a quiet machine."
        )
    return Group(*parts)


def _speeds(report: dict[str, Any]) -> Table:
    first = report["workloads"][0]
    mode = "eager" if report["settings"]["enforce_eager"] else "compiled"
    table = _table(
        f"{mode}, {report['settings']['dtype']}, sequences of {first['prompt_len']} + "
        f"{first['output_len']} tokens, median of {first['rounds']} rounds",
        ("batch", "", "prefill tok/s", "decode tok/s", "Graft over it: prefill", "decode",
         "same first token"),
    )  # fmt: skip
    for batch, limit in report["ceilings"]["limits"].items():
        for name, row in report["contenders"].items():
            rates = row["batches"][batch]
            over = report["ratios"].get(name, {}).get("batches", {}).get(batch)
            table.add_row(
                batch if name == GRAFT else "",
                LABELS[name],
                f"{rates['prefill']:.0f}",
                f"{rates['decode']:.1f}",
                *([f"{over[key]:.2f}" for key in ("prefill", "decode")] if over else ["", ""]),
                f"{over['same_first_token']:.0%}" if over else "",
            )
        if limit["decode"] is not None:
            figures = (f"{limit['prefill']:.0f}", f"{limit['decode']:.1f}")
            table.add_row("", "the machine's limit", *figures, "", "", "")
    return table


def _costs(report: dict[str, Any]) -> Table:
    table = _table(
        "starts, memory, Python",
        ("", "first start s", "start s", "memory GiB", "peak GiB", "Python µs/step",
         "Graft over it: start", "memory"),
    )  # fmt: skip
    for name, row in report["contenders"].items():
        over = report["ratios"].get(name)
        python = "" if row["python_us"] is None else f"{row['python_us']:.0f}"
        table.add_row(
            LABELS[name],
            f"{row['cold_startup_s']:.1f}",
            f"{row['startup_s']:.1f}",
            f"{row['rss_gib']:.2f}",
            f"{row['peak_rss_gib']:.2f}",
            python,
            *([f"{over[key]:.2f}" for key in ("startup", "memory")] if over else ["", ""]),
        )
    return table


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in ("", "batch") else "right")
    return table
