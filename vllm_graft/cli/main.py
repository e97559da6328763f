"""The `vllm-graft` command line: the table of commands, and how errors are shown."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from vllm_graft.cli import bench, doctor, export, generate, list_models, map, serve, version
from vllm_graft.cli.errors import CommandError

PROGRAM = "vllm-graft"

app = typer.Typer(
    name=PROGRAM,
    help="Serve, try out and measure any PyTorch language model in stock vLLM.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_SERVING, _ABOUT = "Run a model", "About"
app.command("serve", context_settings=serve.PASS_THROUGH, rich_help_panel=_SERVING)(serve.serve)
app.command("generate", rich_help_panel=_SERVING)(generate.generate)
app.command("bench", rich_help_panel=_SERVING)(bench.bench)
app.command("doctor", rich_help_panel=_SERVING)(doctor.doctor)
app.command("export", rich_help_panel=_SERVING)(export.export)
app.command("map", rich_help_panel=_SERVING)(map.map_weights)
app.command("list", rich_help_panel=_ABOUT)(list_models.list_models)
app.command("version", rich_help_panel=_ABOUT)(version.version)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Serve, try out and measure any PyTorch language model in stock vLLM."""


def main(argv: list[str] | None = None) -> None:
    """Run one command and exit with its status.

    0 is success, 1 a failure, 2 bad usage, 130 an interrupt. Errors are one
    message on stderr; `vllm-graft --debug COMMAND ...` shows the traceback.
    """
    arguments = sys.argv[1:] if argv is None else argv
    debug = arguments[:1] == ["--debug"]
    try:
        if serve.asks_for_vllm_help(arguments):
            serve.run_vllm(arguments)
        status = app(arguments, prog_name=PROGRAM, standalone_mode=False)
    except (CommandError, typer.TyperException) as error:
        if debug:
            raise
        sys.exit(_show(error, arguments))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)


def _show(error: CommandError | typer.TyperException, arguments: list[str]) -> int:
    text = error.format_message() if isinstance(error, typer.TyperException) else str(error)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print("error:", style="bold red", end=" ")
    console.print(text, markup=False)
    if error.exit_code == 2:
        commands = [info.name for info in app.registered_commands]
        command = next((word for word in arguments if word in commands), "")
        console.print(f"See {' '.join([PROGRAM, command]).strip()} --help", markup=False)
    return int(error.exit_code)
