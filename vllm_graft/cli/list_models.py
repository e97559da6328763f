"""`vllm-graft list`: the architectures that `--arch` takes."""

from __future__ import annotations

import json

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from vllm_graft.cli.options import Json
from vllm_graft.serve import registry


def list_models(as_json: Json = False) -> None:
    """List the architectures that --arch takes: built in, and registered in this environment."""
    rows = entries()
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table(box=box.SIMPLE, pad_edge=False)
    for title in ("architecture", "factory", "source"):
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(row["architecture"], row["factory"] or row["reason"], row["source"])
    Console(highlight=False).print(table)


def entries() -> list[dict[str, str | None]]:
    """One entry per architecture; a registration hides a built-in of the same name."""
    registered = registry.registrations()
    rows: list[dict[str, str | None]] = [
        {"architecture": arch, "factory": target, "reason": None, "source": "built in"}
        for arch, target in registry.BUILT_IN.items()
        if arch not in registered
    ]
    rows += [
        {
            "architecture": arch,
            "factory": entry.target,
            "reason": entry.reason or None,
            "source": "registered",
        }
        for arch, entry in registered.items()
    ]
    return sorted(rows, key=lambda row: str(row["architecture"]))
