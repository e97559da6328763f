"""Options that several commands share, with one help text each."""

from __future__ import annotations

from typing import Annotated

import typer

MODEL = "Model"
ENGINE = "Engine"
SAMPLING = "Sampling"
OUTPUT = "Output"
DTYPES = ("auto", "bfloat16", "float16", "float32")


def _known_dtype(value: str) -> str:
    if value not in DTYPES:
        raise typer.BadParameter(f"{value!r}; expected one of {', '.join(DTYPES)}")
    return value


Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="Folder with config.json, safetensors and tokenizer, or a Hugging Face Hub name.",
    ),
]
Arch = Annotated[
    str | None,
    typer.Option(
        "--arch",
        metavar="NAME",
        help="Architecture to build: built in, registered, or the name for --factory.",
        rich_help_panel=MODEL,
        show_default="the checkpoint's own, if registered",
    ),
]
Factory = Annotated[
    str | None,
    typer.Option(
        "--factory",
        metavar="MODULE:ATTR",
        help="Factory as package.module:attribute or path/file.py:attribute.",
        rich_help_panel=MODEL,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="|".join(DTYPES),
        help="Of weights and activations; auto is the checkpoint's.",
        callback=_known_dtype,
        rich_help_panel=ENGINE,
    ),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        "--max-model-len",
        min=1,
        help="Longest sequence, prompt and output, in tokens.",
        rich_help_panel=ENGINE,
    ),
]
EnforceEager = Annotated[
    bool,
    typer.Option(
        "--enforce-eager", help="Run the model without torch.compile.", rich_help_panel=ENGINE
    ),
]
TensorParallel = Annotated[
    int,
    typer.Option(
        "--tensor-parallel-size",
        min=1,
        help="Processes that share each layer.",
        rich_help_panel=ENGINE,
    ),
]
PipelineParallel = Annotated[
    int,
    typer.Option(
        "--pipeline-parallel-size",
        min=1,
        help="Stages that divide the layers, a process each.",
        rich_help_panel=ENGINE,
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Machine-readable output.", rich_help_panel=OUTPUT),
]
