"""What the demo proves, each check with its measured value."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from examples.demo.engines import (
    Completion,
    cached_bytes_per_token,
    complete,
    live_module,
    native_engine,
    step_live_module,
    trained_log_probs,
)
from examples.demo.ports import Port
from examples.demo.text import Corpus
from examples.rl.grpo_arithmetic import Settings, rise
from examples.rl.report import Step

NUM_PROMPTS, NEW_TOKENS = 16, 64
NATIVE_LIMIT = 1e-4
"""Two float32 implementations order their sums differently; log-probs differ by about 1e-6."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the table."""

    claim: str
    measured: str
    passed: bool


def draw_prompts(tokens: torch.Tensor, count: int) -> list[list[int]]:
    """Pieces of 4 to 49 tokens, spread over `tokens`."""
    stride = len(tokens) // count
    return [tokens[i * stride : i * stride + 4 + 3 * i].tolist() for i in range(count)]


def native_completions(checkpoint: Path, port: Port, prompts: list[list[int]]) -> list[Completion]:
    """Completions by vLLM's own model."""
    with native_engine(checkpoint, port) as llm:
        return complete(llm, prompts, NEW_TOKENS)


def check_live_engine(
    llm: Any, port: Port, corpus: Corpus, native: list[Completion]
) -> list[Check]:
    """The checks of every model, on an engine that serves TorchTitan's."""
    prompts = [completion.prompt for completion in native]
    served = complete(llm, prompts, NEW_TOKENS)
    module = live_module(llm)
    checks = [
        same_tokens(served, native, port.title),
        near_log_probs(served, native),
        equal_to_training(module, served, "engine log-probs = training forward, bit for bit"),
    ]
    step_live_module(module, draw_prompts(corpus.train, NUM_PROMPTS), lr=1e-3)
    # Cached prefixes were computed with the weights from before the step.
    llm.reset_prefix_cache()
    stepped = complete(llm, prompts, NEW_TOKENS)
    return [
        *checks,
        step_is_visible(served, stepped),
        equal_to_training(module, stepped, "the same after the optimizer step"),
    ]


def same_tokens(served: list[Completion], native: list[Completion], title: str) -> Check:
    """Greedy tokens are those of vLLM's own model."""
    equal, total = count_equal([c.tokens for c in served], [c.tokens for c in native])
    return Check(
        claim=f"greedy tokens = vLLM's own {title}",
        measured=f"{equal:,} of {total:,} tokens equal",
        passed=equal == total,
    )


def near_log_probs(served: list[Completion], native: list[Completion]) -> Check:
    """Log-probs are those of vLLM's own Qwen3 up to float32 rounding."""
    differences = [
        (a.log_probs - b.log_probs).abs().max().item() for a, b in zip(served, native, strict=True)
    ]
    return Check(
        claim=f"log-probs within {NATIVE_LIMIT:.0e} of vLLM's own",
        measured=f"largest difference {max(differences):.1e}",
        passed=max(differences) <= NATIVE_LIMIT,
    )


def equal_to_training(module: Any, served: list[Completion], claim: str) -> Check:
    """Log-probs are bit-equal to the training forward of the module that is served."""
    trained = trained_log_probs(module, served)
    equal, total = count_equal(
        [c.log_probs.tolist() for c in served], [row.tolist() for row in trained]
    )
    return Check(
        claim=claim,
        measured=f"{equal:,} of {total:,} equal",
        passed=equal == total,
    )


def step_is_visible(before: list[Completion], after: list[Completion]) -> Check:
    """Every prompt's first log-prob, a function of prompt and weights alone, has moved."""
    moved = [
        a.tokens[0] != b.tokens[0] or a.log_probs[0].item() != b.log_probs[0].item()
        for a, b in zip(before, after, strict=True)
    ]
    return Check(
        claim="one optimizer step on the live module reaches the engine",
        measured=f"{sum(moved)} of {len(moved)} completions start with another log-prob",
        passed=all(moved),
    )


def latent_cache(llm: Any, config: Any) -> Check:
    """The engine caches latent vectors, not the keys and values of every head."""
    key_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    expanded = config.num_attention_heads * (key_dim + config.v_head_dim)
    latent = config.kv_lora_rank + config.qk_rope_head_dim
    float32_layers = 4 * config.num_hidden_layers
    measured = cached_bytes_per_token(llm)
    return Check(
        claim=f"KV cache: {latent} numbers per token and layer",
        measured=f"{measured:,} bytes per token; expanded it would be "
        f"{expanded * float32_layers:,}",
        passed=measured == latent * float32_layers,
    )


def count_equal(left: list[list[Any]], right: list[list[Any]]) -> tuple[int, int]:
    """Equal entries, and all entries."""
    pairs = [pair for a, b in zip(left, right, strict=True) for pair in zip(a, b, strict=True)]
    return sum(a == b for a, b in pairs), len(pairs)


def served_title(port: Port) -> str:
    """What the checks of a served model were measured on."""
    return f"{port.arch} in vLLM, {NUM_PROMPTS} prompts x {NEW_TOKENS} tokens, float32"


def check_learning(steps: list[Step], settings: Settings) -> list[Check]:
    """Reinforcement learning made the policy better, and engine and trainer stayed one."""
    tokens, unequal = sum(s.tokens for s in steps), sum(s.unequal for s in steps)
    first, last = rise(steps)
    return [
        Check(
            claim="KL between engine and trainer is 0 at every step",
            measured=f"{tokens - unequal:,} of {tokens:,} log-probs equal, {len(steps)} steps",
            passed=unequal == 0 and all(s.kl == 0.0 for s in steps),
        ),
        Check(
            claim=f"mean reward rises by {settings.goal}",
            measured=f"from {first:.2f} to {last:.2f}",
            passed=last - first >= settings.goal,
        ),
    ]


def check_table(title: str, checks: list[Check]) -> Table:
    """The checks as a table."""
    table = Table(title=title)
    for heading in ("check", "measured", ""):
        table.add_column(heading)
    for check in checks:
        verdict = "[green]pass[/]" if check.passed else "[bold red]FAIL[/]"
        table.add_row(check.claim, check.measured, verdict)
    return table
