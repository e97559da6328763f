"""`vllm-graft map`: propose how a checkpoint loads into a factory's model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vllm_graft.cli.errors import CommandError, UsageError
from vllm_graft.cli.generate import settle_environment, stdout_kept_clean
from vllm_graft.cli.options import OUTPUT, Arch, Checkpoint, Factory, Json
from vllm_graft.cli.target import import_factory, register_target

if TYPE_CHECKING:
    from vllm_graft.weights.solve.line import Line
    from vllm_graft.weights.solve.plan import WeightPlan

Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="FILE", help="Write the plan here.", rich_help_panel=OUTPUT),
]


def map_weights(
    checkpoint: Checkpoint,
    arch: Arch = None,
    factory: Factory = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Propose which checkpoint tensor becomes which parameter; what stays open is an error."""
    if out is not None and not out.absolute().parent.is_dir():
        raise UsageError(f"--out {out}: expected a file in a folder that exists")
    name = register_target(checkpoint, arch, factory)
    with stdout_kept_clean():
        settle_environment(verbose=False)
        import_factory(name)
        plan = _solve(checkpoint, name)
    if out is not None:
        plan.save(out)
    if as_json:
        typer.echo(plan.to_json(), nl=False)
    else:
        _show(plan)


def _solve(checkpoint: str, arch: str) -> WeightPlan:
    from vllm_graft.weights.solve.solver import solve_weight_plan

    screen = Console(stderr=True, highlight=False)
    try:
        with screen.status("building the model") as status:
            model = _build(checkpoint, arch)
            status.update("mapping")
            return solve_weight_plan(model, checkpoint)
    except Exception as error:
        raise CommandError(f"{checkpoint} ({arch}): {type(error).__name__}: {error}") from error


def _build(checkpoint: str, arch: str) -> Any:
    """The factory's module for one rank, without an engine."""
    import torch
    from transformers import AutoConfig

    from vllm_graft.adapting import call_factory
    from vllm_graft.parallel import ParallelContext
    from vllm_graft.serve.registry import factory_of

    config = AutoConfig.from_pretrained(checkpoint)
    longest = getattr(config, "max_position_embeddings", 2048)
    made = SimpleNamespace(hf_config=config, max_model_len=longest, dtype=torch.float32)
    vllm_config = SimpleNamespace(hf_config=config, model_config=made)
    return call_factory(factory_of(arch), vllm_config, ParallelContext())


def _show(plan: WeightPlan) -> None:
    table = Table("checkpoint", "model", "", "decided by")
    for line in plan.lines:
        table.add_row(line.source, line.target or "(waived)", _changes(line), line.by)
    Console(highlight=False, soft_wrap=True).print(table)


def _changes(line: Line) -> str:
    made = line.to_json()
    words = ["transposed"] if line.transposed else []
    words += [f"{word} rows {made[word]}" for word in ("take", "put") if word in made]
    if line.rope is not None:
        words.append(f"RoPE to {line.rope.to}")
    return ", ".join(words)
