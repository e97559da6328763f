"""`vllm-graft export`: a port's weights as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_graft.cli.errors import CommandError, UsageError
from vllm_graft.cli.generate import settle_environment, stdout_kept_clean
from vllm_graft.cli.options import OUTPUT, Arch, Checkpoint, Factory
from vllm_graft.cli.target import import_factory, read_config, register_target

Out = Annotated[
    Path,
    typer.Option(
        "--out", metavar="FOLDER", help="New or empty folder to write.", rich_help_panel=OUTPUT
    ),
]


def export(
    checkpoint: Checkpoint,
    out: Out,
    arch: Arch = None,
    factory: Factory = None,
) -> None:
    """Load a checkpoint into your model and write it back: safetensors, config, tokenizer."""
    if not Path(checkpoint).is_dir():
        raise UsageError(f"{checkpoint}: expected the checkpoint's folder")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UsageError(f"--out {out}: expected a new or empty folder")
    name = register_target(checkpoint, arch, factory)
    with stdout_kept_clean():
        settle_environment(verbose=False)
        import_factory(name)
        written = _export(checkpoint, name, out)
    typer.echo(f"{out}: {written} tensors")


def _export(checkpoint: str, name: str, out: Path) -> int:
    from vllm_graft.serve import _vllm
    from vllm_graft.train.llm import TrainableLLM
    from vllm_graft.weights.save import save_checkpoint

    config = read_config(checkpoint)
    # vLLM's own "auto" would round float32 to bfloat16.
    dtype = config.get("dtype") or config.get("torch_dtype") or "auto"
    try:
        llm = TrainableLLM(
            checkpoint, arch=name, dtype=dtype, enforce_eager=True, max_model_len=128,
            skip_tokenizer_init=True, exact=_vllm.platform_device() == "cpu",
        )  # fmt: skip
        try:
            return len(save_checkpoint(llm.model, checkpoint, out))
        finally:
            llm.llm_engine.engine_core.shutdown()
    except Exception as error:
        raise CommandError(f"{checkpoint} ({name}): {type(error).__name__}: {error}") from error
