"""`vllm-graft bench`: Graft against vLLM's own models on the same checkpoint and flags."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_graft.bench.ceilings import ceilings
from vllm_graft.bench.plot import draw
from vllm_graft.bench.process import WorkerError
from vllm_graft.bench.report import as_json, tables
from vllm_graft.bench.run import Tell, child_env, contenders, measure, read_once, steps
from vllm_graft.bench.shapes import SHAPES, write_in_child
from vllm_graft.bench.spec import GRAFT, PEERS, VARIANTS, Workload
from vllm_graft.cli.errors import CommandError, UsageError
from vllm_graft.cli.options import MODEL, OUTPUT, Arch, Dtype, EnforceEager, Factory, MaxModelLen
from vllm_graft.cli.target import register_target

OTHERS = (*PEERS, *(name for name in VARIANTS if name != GRAFT))

_WORK = "Workload"
MaybeCheckpoint = Annotated[
    str | None,
    typer.Argument(metavar="CHECKPOINT", help="Checkpoint folder or Hub name; or use --shape."),
]
Shape = Annotated[
    str | None,
    typer.Option(
        "--shape",
        metavar="|".join(SHAPES),
        help="Make a random-weight checkpoint of this size: in CHECKPOINT, a folder that "
        "does not exist yet, or in a temporary one.",
        rich_help_panel=MODEL,
    ),
]
Against = Annotated[
    list[str] | None,
    typer.Option(
        "--against",
        metavar="|".join(OTHERS),
        help="Compare with vLLM's own model class, its Transformers backend, or Graft without "
        "exact serving, with weights as training keeps them, or without packed copies; may be "
        "repeated.",
        rich_help_panel=_WORK,
    ),
]
BatchSize = Annotated[
    list[int] | None,
    typer.Option(
        "--batch-size",
        min=1,
        help="Sequences per round; may be repeated.",
        show_default="8",
        rich_help_panel=_WORK,
    ),
]
PromptLen = Annotated[
    int, typer.Option("--prompt-len", min=1, help="Tokens per prompt.", rich_help_panel=_WORK)
]
OutputLen = Annotated[
    int,
    typer.Option("--output-len", min=2, help="New tokens per sequence.", rich_help_panel=_WORK),
]
Rounds = Annotated[
    int,
    typer.Option("--rounds", min=1, help="Rounds, taken in turn.", rich_help_panel=_WORK),
]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the report here.", rich_help_panel=OUTPUT),
]
PngFile = Annotated[
    Path | None,
    typer.Option("--png", metavar="FILE", help="Draw the report here.", rich_help_panel=OUTPUT),
]
LogDir = Annotated[
    Path | None,
    typer.Option(
        "--log-dir",
        metavar="FOLDER",
        help="Where the engines' logs go.",
        rich_help_panel=OUTPUT,
        show_default="a temporary folder",
    ),
]


def bench(
    checkpoint: MaybeCheckpoint = None,
    arch: Arch = None,
    factory: Factory = None,
    shape: Shape = None,
    against: Against = None,
    batch_size: BatchSize = None,
    prompt_len: PromptLen = 64,
    output_len: OutputLen = 32,
    rounds: Rounds = 5,
    dtype: Dtype = "auto",
    max_model_len: MaxModelLen = None,
    enforce_eager: EnforceEager = False,
    json_file: JsonFile = None,
    png_file: PngFile = None,
    log_dir: LogDir = None,
) -> None:
    """Measure prefill and decode tokens/s, startup time and peak memory.

    Every contender is an engine in a process of its own. Rounds are taken in
    turn, so a machine that slows down slows all of them.
    """
    peers = _check_names(against or [], shape)
    _check_writable("--json", json_file)
    _check_writable("--png", png_file)
    _check_plots(png_file)
    workloads = [
        Workload(batch_size=size, prompt_len=prompt_len, output_len=output_len, rounds=rounds)
        for size in dict.fromkeys(batch_size or [8])
    ]
    engine = {
        "dtype": dtype,
        "enforce_eager": enforce_eager,
        "max_model_len": _context_length(workloads[0], max_model_len),
    }
    screen = Console(stderr=True, highlight=False)
    with _checkpoint(checkpoint, shape, screen) as folder, _logs(log_dir) as logs:
        report = _run(folder, arch, factory, peers, workloads, engine, logs, screen)
    report["settings"]["checkpoint"] = f"random weights, {shape}" if shape else checkpoint
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if png_file is not None:
        draw(report, png_file)
    Console(highlight=False).print(tables(report))


def _run(
    checkpoint: str,
    arch: str | None,
    factory: str | None,
    peers: list[str],
    workloads: list[Workload],
    engine: dict[str, Any],
    logs: Path,
    screen: Console,
) -> dict[str, Any]:
    user_env = dict(os.environ)
    name = register_target(checkpoint, arch, factory)
    read_once(Path(checkpoint))
    fixed = {"skip_tokenizer_init": True, "enable_prefix_caching": False, "seed": 0}
    llm = {"model": checkpoint, **engine, **fixed}
    with tempfile.TemporaryDirectory(prefix="vllm-graft-bench-") as cache:
        entrants = contenders(arch=name, peers=peers, llm=llm, user_env=user_env, cache=Path(cache))
        limits = ceilings(Path(checkpoint), engine["dtype"], child_env(user_env, Path(cache)))
        with progress(screen, steps(len(entrants), workloads)) as tell:
            try:
                results = measure(entrants, workloads, logs, tell)
            except WorkerError as error:
                raise CommandError(str(error)) from error
    return as_json(results, workloads, {"architecture": name, **engine, **fixed}, limits)


def _check_names(peers: list[str], shape: str | None) -> list[str]:
    unknown = [peer for peer in peers if peer not in OTHERS]
    if unknown:
        raise UsageError(f"--against {unknown[0]}: expected one of {', '.join(OTHERS)}")
    if shape is not None and shape not in SHAPES:
        raise UsageError(f"--shape {shape}: expected one of {', '.join(SHAPES)}")
    return list(dict.fromkeys(peers))


def _check_writable(option: str, path: Path | None) -> None:
    """Find out before the measurement, not after it."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise UsageError(f"{option} {path}: expected a file in a folder that exists")


def _check_plots(path: Path | None) -> None:
    if path is not None and find_spec("matplotlib") is None:
        raise UsageError(f"--png {path}: plots need matplotlib: pip install matplotlib")


def _context_length(workload: Workload, asked: int | None) -> int:
    needed = workload.prompt_len + workload.output_len
    if asked is not None and asked < needed:
        raise UsageError(
            f"--max-model-len {asked}: a round needs prompt_len + output_len = "
            f"{workload.prompt_len} + {workload.output_len} = {needed}"
        )
    return asked or needed


@contextmanager
def _checkpoint(checkpoint: str | None, shape: str | None, screen: Console) -> Iterator[str]:
    """The checkpoint to measure, made first when `--shape` asks for it."""
    if shape is None:
        if checkpoint is None:
            raise UsageError(f"give a CHECKPOINT, or --shape {'|'.join(SHAPES)} to make one")
        yield checkpoint
        return
    if checkpoint is not None and Path(checkpoint).exists():
        raise UsageError(f"{checkpoint}: exists already; leave out --shape to measure it")
    with tempfile.TemporaryDirectory(prefix="vllm-graft-bench-") as temporary:
        folder = Path(checkpoint or temporary)
        with screen.status(f"writing random {shape} weights"):
            try:
                write_in_child(shape, folder)
            except RuntimeError as error:
                raise CommandError(str(error)) from error
        yield str(folder)


@contextmanager
def _logs(folder: Path | None) -> Iterator[Path]:
    """`folder`, made if need be; without one a temporary folder, kept when something fails."""
    logs = folder or Path(tempfile.mkdtemp(prefix="vllm-graft-bench-"))
    logs.mkdir(parents=True, exist_ok=True)
    yield logs
    if folder is None:
        shutil.rmtree(logs)


@contextmanager
def progress(screen: Console, total: int) -> Iterator[Tell]:
    """A progress bar on a terminal, one line per finished step elsewhere."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=screen, disable=not screen.is_terminal) as bar:
        task = bar.add_task("", total=total)

        def tell(what: str, finished: int) -> None:
            bar.update(task, description=what, advance=finished)
            if finished and not screen.is_terminal:
                screen.print(what)

        yield tell
