"""`vllm-graft doctor`: a port against the right model of the same checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vllm_graft.cli.errors import UsageError
from vllm_graft.cli.generate import settle_environment, stdout_kept_clean
from vllm_graft.cli.options import ENGINE, MODEL, OUTPUT, Arch, Checkpoint, Factory
from vllm_graft.cli.target import import_factory, register_target

if TYPE_CHECKING:
    from vllm_graft.doctor.report import Report
REFERENCES = ("transformers", "original", "vllm")
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the report here.", rich_help_panel=OUTPUT),
]
HtmlFile = Annotated[
    Path | None,
    typer.Option(
        "--html", metavar="FILE", help="Write a page with a plot here.", rich_help_panel=OUTPUT
    ),
]
Source = Annotated[
    str,
    typer.Option(
        "--reference",
        metavar="|".join(REFERENCES),
        help="The right model: Transformers' own, what the factory returns untouched, or vLLM's.",
        rich_help_panel=MODEL,
    ),
]
Compiled = Annotated[
    bool,
    typer.Option("--compile", help="Compare with torch.compile too.", rich_help_panel=ENGINE),
]
Ranks = Annotated[
    int,
    typer.Option("--tp", min=1, help="Compare with so many ranks too.", rich_help_panel=ENGINE),
]


def doctor(
    checkpoint: Checkpoint,
    arch: Arch = None,
    factory: Factory = None,
    reference: Source = "transformers",
    compiled: Compiled = False,
    tp: Ranks = 1,
    json_file: JsonFile = None,
    html_file: HtmlFile = None,
) -> int:
    """Compare a port with the right model on every path; 0 healthy, 1 diverges, 2 could not run."""
    for option, file in (("--json", json_file), ("--html", html_file)):
        if file is not None and not file.absolute().parent.is_dir():
            raise UsageError(f"{option} {file}: expected a file in a folder that exists")
    if reference not in REFERENCES:
        raise UsageError(f"--reference {reference}: expected one of {', '.join(REFERENCES)}")
    name = register_target(checkpoint, arch, factory)
    with stdout_kept_clean():
        settle_environment(verbose=False)
        import_factory(name)
        options = {"reference": reference, "compiled": compiled, "tensor_parallel_size": tp}
        report = _run(checkpoint, name, **options)
    _show(report)
    if json_file is not None:
        content = {"healthy": report.healthy, **asdict(report)}
        json_file.write_text(json.dumps(content, indent=2), encoding="utf-8")
    if html_file is not None:
        from vllm_graft.doctor.page import page

        html_file.write_text(page(report, f"{checkpoint} ({name})"), encoding="utf-8")
    return 0 if report.healthy else 1


def _run(checkpoint: str, name: str, **options: Any) -> Report:
    from vllm_graft.doctor.run import doctor as examine

    screen = Console(stderr=True, highlight=False)
    try:
        with screen.status("starting") as status:
            return examine(checkpoint, name, status.update, **options)
    except Exception as error:
        raise UsageError(f"{checkpoint} ({name}): {type(error).__name__}: {error}") from error


def _show(report: Report) -> None:
    table = Table("path", "tokens", "max |difference|, nats", "greedy equal", "")
    for each in report.paths:
        verdict = "ok" if each.healthy else "DIVERGES"
        greedy = f"{each.greedy_equal} / {each.tokens}"
        table.add_row(each.path, str(each.tokens), f"{each.max_difference:.2e}", greedy, verdict)
    screen = Console(highlight=False, soft_wrap=True)
    screen.print(table)
    if report.first is not None:
        spot = report.first
        screen.print(
            f"First apart at {spot.name} ({spot.role}): {spot.value:.6g}, expected "
            f"{spot.expected:.6g}, token {spot.token}", markup=False,
        )  # fmt: skip
    worst = max(report.gradients, key=lambda each: each.error, default=None)
    if worst is not None:
        screen.print(
            f"Gradients of {len(report.gradients)} weights: furthest is {worst.name}, "
            f"{worst.error:.1e} of its largest value", markup=False,
        )  # fmt: skip
    for diagnosis in report.diagnoses:
        screen.print(f"- {diagnosis}", markup=False)
    for omission in report.left_out:
        screen.print(f"Left out: {omission.what}: {omission.why}", markup=False)
    screen.print(f"{'healthy' if report.healthy else 'diverges'}, {report.seconds:.0f} s")
