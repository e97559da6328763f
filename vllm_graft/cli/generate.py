"""`vllm-graft generate`: complete prompts with an engine in this process."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_graft.cli.errors import CommandError, UsageError
from vllm_graft.cli.options import (
    OUTPUT,
    SAMPLING,
    Arch,
    Checkpoint,
    Dtype,
    EnforceEager,
    Factory,
    Json,
    MaxModelLen,
    PipelineParallel,
    TensorParallel,
)
from vllm_graft.cli.target import config_format, import_factory, register_target
from vllm_graft.serve.own_config import has_tokenizer

Prompts = Annotated[
    list[str],
    typer.Option(
        "--prompt",
        help="Text (without a tokenizer: token ids); may be repeated.",
        rich_help_panel=SAMPLING,
    ),
]
MaxTokens = Annotated[
    int,
    typer.Option("--max-tokens", min=1, help="New tokens per prompt.", rich_help_panel=SAMPLING),
]
Temperature = Annotated[
    float,
    typer.Option("--temperature", min=0.0, help="0 is greedy.", rich_help_panel=SAMPLING),
]
TopP = Annotated[
    float,
    typer.Option(
        "--top-p", min=0.0, max=1.0, help="Nucleus sampling mass.", rich_help_panel=SAMPLING
    ),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", help="Makes sampling repeatable.", rich_help_panel=SAMPLING),
]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", help="Show vLLM's log on stderr.", rich_help_panel=OUTPUT),
]


def generate(
    checkpoint: Checkpoint,
    prompt: Prompts,
    arch: Arch = None,
    factory: Factory = None,
    max_tokens: MaxTokens = 64,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    dtype: Dtype = "auto",
    max_model_len: MaxModelLen = None,
    enforce_eager: EnforceEager = False,
    tensor_parallel_size: TensorParallel = 1,
    pipeline_parallel_size: PipelineParallel = 1,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Complete prompts and print the new text, one completion per prompt."""
    name = register_target(checkpoint, arch, factory)
    engine = {
        "dtype": dtype,
        "max_model_len": max_model_len,
        "enforce_eager": enforce_eager,
        "tensor_parallel_size": tensor_parallel_size,
        "pipeline_parallel_size": pipeline_parallel_size,
    }
    sampling = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    with stdout_kept_clean():
        settle_environment(verbose)
        import_factory(name)
        completions = complete(checkpoint, name, prompt, engine, sampling)
    if as_json:
        typer.echo(json.dumps(completions, ensure_ascii=False, indent=2))
        return
    for completion in completions:
        typer.echo(completion["text"])


def complete(
    checkpoint: str,
    arch: str,
    prompts: list[str],
    engine: dict[str, Any],
    sampling: dict[str, Any],
) -> list[dict[str, Any]]:
    """Run the prompts through vLLM in this process.

    Args:
        checkpoint: local folder or Hub name.
        arch: a registered architecture.
        prompts: texts.
        engine: arguments of `vllm.LLM`.
        sampling: arguments of `vllm.SamplingParams`.

    Returns:
        One entry per prompt, in order.

    Raises:
        CommandError: the engine could not start or run.
    """
    from vllm import LLM, SamplingParams

    inputs: list[Any] = list(prompts)
    if not has_tokenizer(Path(checkpoint)):
        inputs = [{"prompt_token_ids": token_ids(prompt)} for prompt in prompts]
        engine, sampling = (
            {**engine, "skip_tokenizer_init": True},
            {**sampling, "detokenize": False},
        )
    try:
        overrides = {"architectures": [arch]}
        llm = LLM(checkpoint, hf_overrides=overrides, **config_format(checkpoint), **engine)
        outputs = llm.generate(inputs, SamplingParams(**sampling), use_tqdm=sys.stderr.isatty())
    except Exception as error:
        raise CommandError(f"{checkpoint} ({arch}): {type(error).__name__}: {error}") from error
    return [_entry(output) for output in outputs]


def token_ids(prompt: str) -> list[int]:
    """The prompt for a checkpoint without a tokenizer: token ids with blanks between.

    Raises:
        UsageError: it is something else.
    """
    try:
        return [int(word) for word in prompt.split()]
    except ValueError:
        raise UsageError(
            f"--prompt {prompt!r}: the checkpoint has no tokenizer; write token ids, as in '5 9 2'"
        ) from None


def _entry(output: Any) -> dict[str, Any]:
    completion = output.outputs[0]
    return {
        "prompt": output.prompt,
        "text": completion.text or " ".join(map(str, completion.token_ids)),
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "prompt_tokens": len(output.prompt_token_ids),
        "completion_tokens": len(completion.token_ids),
    }


def settle_environment(verbose: bool) -> None:
    """The engine runs in this process, and its log level follows `--verbose`."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO" if verbose else "ERROR")


@contextmanager
def stdout_kept_clean() -> Iterator[None]:
    """Send what libraries write to stdout, from C++ too, to stderr meanwhile."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
