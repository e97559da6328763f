"""Training TorchTitan's Qwen3 with the attention that will serve it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from examples.custom_models.qwen3_torchtitan import qwen3_config
from examples.demo.ports import MAX_LENGTH, QWEN3
from examples.demo.text import Corpus
from vllm_graft import replace_with_trainable_attention


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast to train."""

    steps: int
    rows: int = 4
    length: int = 128
    peak_lr: float = 4e-3
    warmup: int = 20
    limit_s: float = 150.0
    """Seconds after which training stops early, half as many again as two free cores need."""

    def lr(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a tenth of the peak."""
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / self.steps)
        return self.peak_lr * cosine * min((step + 1) / self.warmup, 1.0)


def build_model() -> Any:
    """TorchTitan's model with its seam swapped, float32, freshly initialized."""
    model: Any = qwen3_config(QWEN3.hf_config, MAX_LENGTH).build()
    model.init_weights()
    replace_with_trainable_attention(model)
    return model


def next_token_loss(model: Any, tokens_BL: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of every token given those before it in its row."""
    logits_BLV = model(tokens_BL[:, :-1])
    return F.cross_entropy(logits_BLV.flatten(0, 1), tokens_BL[:, 1:].flatten())


def train(model: Any, corpus: Corpus, schedule: Schedule, console: Console) -> float:
    """Train with AdamW and return the held-out loss in nats per token."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=schedule.peak_lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    generator, started = torch.Generator().manual_seed(0), time.monotonic()
    with progress_bar(console) as progress:
        task = progress.add_task("training", total=schedule.steps, loss=math.nan, speed=0.0)
        for step in range(schedule.steps):
            elapsed = time.monotonic() - started
            if elapsed > schedule.limit_s:
                console.print(f"stopped after {elapsed:.0f} s: this machine is busy or slow")
                break
            for group in optimizer.param_groups:
                group["lr"] = schedule.lr(step)
            loss = next_token_loss(model, draw(corpus.train, schedule, generator))
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            trained = (step + 1) * schedule.rows * schedule.length
            speed = trained / (time.monotonic() - started)
            progress.update(task, advance=1, loss=loss.item(), speed=speed)
    return held_out_loss(model, corpus.held_out, schedule)


def draw(tokens: torch.Tensor, schedule: Schedule, generator: torch.Generator) -> torch.Tensor:
    """A batch `[rows, length + 1]` from random places."""
    last = len(tokens) - schedule.length - 1
    starts = torch.randint(0, last, (schedule.rows,), generator=generator)
    return torch.stack([tokens[start : start + schedule.length + 1] for start in starts.tolist()])


@torch.no_grad()
def held_out_loss(model: Any, tokens: torch.Tensor, schedule: Schedule) -> float:
    """Loss over the whole held-out text."""
    width = schedule.length + 1
    rows = tokens[: len(tokens) // width * width].view(-1, width)
    parts = torch.split(rows, schedule.rows)
    losses = [next_token_loss(model, part) * len(part) for part in parts]
    return float(sum(losses)) / len(rows)


def progress_bar(console: Console) -> Progress:
    """Bar, step count, loss and tokens per second."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.2f}"),
        TextColumn("{task.fields[speed]:,.0f} tokens/s"),
        TimeElapsedColumn(),
        console=console,
    )
