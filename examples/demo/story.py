"""The demo from text to tables, one step after the other."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from transformers.utils.logging import disable_progress_bar

from examples.demo.checkpoint import write_checkpoint, write_random_checkpoint
from examples.demo.checks import (
    NUM_PROMPTS,
    check_learning,
    check_live_engine,
    check_table,
    draw_prompts,
    latent_cache,
    native_completions,
    served_title,
)
from examples.demo.engines import Completion, graft_engine, improvise
from examples.demo.ports import DEEPSEEK_V3, QWEN3, Port
from examples.demo.text import Corpus, load_corpus
from examples.demo.train import Schedule, build_model, train
from examples.rl.grpo_arithmetic import PLOT, QUICK
from examples.rl.grpo_arithmetic import train as learn

PROMPT = 'The "for" statement is used to'


def tell(output: Path, *, quick: bool) -> bool:
    """Run the demo, print what happens, and return whether every check passed."""
    console = Console(highlight=False)
    started = time.monotonic()
    disable_progress_bar()
    with step(console, "text and tokenizer"):
        corpus = load_corpus()
    passed = tell_qwen3(output, corpus, console, steps=40 if quick else 400)
    passed &= tell_deepseek_v3(output / "deepseek_v3", corpus, console)
    passed &= tell_learning(output / "rl", console)
    console.print(f"{time.monotonic() - started:.0f} s")
    return passed


def tell_qwen3(folder: Path, corpus: Corpus, console: Console, steps: int) -> bool:
    """Train, serve and check a Qwen3."""
    torch.manual_seed(0)
    model = build_model()
    size = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"TorchTitan Qwen3, {size / 1e6:.1f}M parameters, {len(corpus.train):,} tokens")
    loss = train(model, corpus, Schedule(steps=steps), console)
    console.print(f"held-out loss {loss:.3f} nats per token")
    checkpoint = write_checkpoint(folder, model, corpus.tokenizer)
    console.print(f"Hugging Face checkpoint in {checkpoint}")
    native = run_native(QWEN3, checkpoint, corpus, console)
    with served(QWEN3, checkpoint, console) as llm:
        text = improvise(llm, PROMPT)
        checks = check_live_engine(llm, QWEN3, corpus, native)
    console.print(Panel(f"[bold]{PROMPT}[/]{escape(text.rstrip())}", title="completion"))
    console.print(check_table(served_title(QWEN3), checks))
    return all(check.passed for check in checks)


def tell_deepseek_v3(folder: Path, corpus: Corpus, console: Console) -> bool:
    """Serve and check a random DeepSeek V3, and train it for one step in the engine."""
    console.print("TorchTitan DeepSeek V3, random weights, latent cache, 16 experts in 4 groups")
    torch.manual_seed(0)
    checkpoint = write_random_checkpoint(folder, corpus.tokenizer)
    console.print(f"Hugging Face checkpoint by Transformers in {checkpoint}")
    native = run_native(DEEPSEEK_V3, checkpoint, corpus, console)
    with served(DEEPSEEK_V3, checkpoint, console) as llm:
        checks = check_live_engine(llm, DEEPSEEK_V3, corpus, native)
        checks.insert(0, latent_cache(llm, DEEPSEEK_V3.hf_config))
    console.print(check_table(served_title(DEEPSEEK_V3), checks))
    return all(check.passed for check in checks)


def tell_learning(folder: Path, console: Console) -> bool:
    """Teach a small Qwen3 to add, on the module that samples its answers."""
    console.print("GRPO on sums of one digit: sampled and trained in one module, bfloat16")
    steps = learn(folder, QUICK, 0, console)
    checks = check_learning(steps, QUICK)
    console.print(check_table(f"GRPO, {len(steps)} steps, plot in {folder / PLOT}", checks))
    return all(check.passed for check in checks)


def run_native(port: Port, checkpoint: Path, corpus: Corpus, console: Console) -> list[Completion]:
    """Completions of held-out text by vLLM's own model."""
    prompts = draw_prompts(corpus.held_out, NUM_PROMPTS)
    with step(console, f"vLLM's own {port.title} on the checkpoint"):
        return native_completions(checkpoint, port, prompts)


@contextmanager
def served(port: Port, checkpoint: Path, console: Console) -> Iterator[Any]:
    """An engine with TorchTitan's model, timed from its start to its end."""
    with step(console, f"{port.arch} through Graft"), graft_engine(checkpoint, port) as llm:
        yield llm


@contextmanager
def step(console: Console, title: str) -> Iterator[None]:
    """Show that a step runs, then how long it took."""
    started = time.monotonic()
    with console.status(title):
        yield
    console.print(f"{title}: {time.monotonic() - started:.1f} s")
