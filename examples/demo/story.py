"""The demo from text to table, one step after the other."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel

from examples.custom_models.qwen3_torchtitan import ARCH
from examples.demo.checkpoint import write_checkpoint
from examples.demo.checks import (
    NUM_PROMPTS,
    check_live_engine,
    check_table,
    draw_prompts,
    native_completions,
)
from examples.demo.engines import engine, improvise
from examples.demo.text import load_corpus
from examples.demo.train import Schedule, build_model, train

PROMPT = 'The "for" statement is used to'


def tell(output: Path, *, quick: bool) -> bool:
    """Run the demo, print what happens, and return whether every check passed."""
    console = Console(highlight=False)
    started = time.monotonic()
    torch.manual_seed(0)
    with step(console, "text and tokenizer"):
        corpus = load_corpus()
    model = build_model()
    size = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"TorchTitan Qwen3, {size / 1e6:.1f}M parameters, {len(corpus.train):,} tokens")
    loss = train(model, corpus, Schedule(steps=40 if quick else 400), console)
    console.print(f"held-out loss {loss:.3f} nats per token")
    checkpoint = write_checkpoint(output, model, corpus.tokenizer)
    console.print(f"Hugging Face checkpoint in {checkpoint}")
    with step(console, "vLLM's own Qwen3 on the checkpoint"):
        native = native_completions(checkpoint, draw_prompts(corpus.held_out, NUM_PROMPTS))
    with step(console, f"{ARCH} through Graft"), engine(checkpoint, ARCH) as llm:
        text = improvise(llm, PROMPT)
        checks = check_live_engine(llm, corpus, native)
    console.print(Panel(f"[bold]{PROMPT}[/]{escape(text)}", title="completion"))
    console.print(check_table(checks))
    console.print(f"{time.monotonic() - started:.0f} s")
    return all(check.passed for check in checks)


@contextmanager
def step(console: Console, title: str) -> Iterator[None]:
    """Show that a step runs, then how long it took."""
    started = time.monotonic()
    with console.status(title):
        yield
    console.print(f"{title}: {time.monotonic() - started:.1f} s")
