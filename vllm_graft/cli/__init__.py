"""The `vllm-graft` command line, one file per command."""

from __future__ import annotations

import sys


def run() -> None:
    """Run the command line, or say which extra brings what it needs."""
    try:
        from vllm_graft.cli.main import main
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(
            f"vllm-graft: the command line needs {error.name}, which comes with an extra: "
            'pip install "vllm-graft[cpu]" or "vllm-graft[cuda]"'
        )
    main()
