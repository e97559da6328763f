"""`vllm-graft version`: the releases that work together here."""

from __future__ import annotations

import json

import typer

from vllm_graft.bench.machine import versions
from vllm_graft.cli.options import Json


def version(as_json: Json = False) -> None:
    """Print the installed releases of Graft, vLLM, torch and the model libraries."""
    found = versions()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    width = max(map(len, found))
    for name, release in found.items():
        typer.echo(f"{name:<{width}}  {release or 'not installed'}")
