"""What tensor parallelism must hold for every library: tokens, bits, loss, gradients, weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.dist.launch import torchrun
from tests.support import relative_error

COMPARED = (1024, 1024)
"""64 tokens for each of 16 prompts."""
AT_MOST = {"loss": 1e-6, "gradients": 1e-5, "log-probabilities": 1e-5}
"""Float32 on two ranks against one: row-parallel products add two partial sums. Loss and
gradients are relative, each gradient to its largest value."""


def run(
    ranks: int, model: str, checkpoint: Path, dtype: str, **options: bool
) -> list[dict[str, Any]]:
    """What every rank of `serve_worker` saw, with these options of the engine."""
    result = checkpoint.parent / f"{dtype}.{ranks}"
    arguments = (model, str(checkpoint), dtype, str(result), json.dumps(options))
    torchrun(ranks, "tests.dist.serve_worker", *arguments)
    return [torch.load(f"{result}.{rank}") for rank in range(ranks)]


def stock_tokens(ranks: int, checkpoint: Path) -> list[list[int]]:
    """The greedy tokens of vLLM's own model, for the prompts of `serve_worker`."""
    result = checkpoint.parent / "stock.json"
    torchrun(ranks, "tests.dist.stock_worker", str(checkpoint), str(result))
    tokens: list[list[int]] = json.loads(result.read_text())
    return tokens


def check_two_ranks(
    model: str,
    checkpoint: Path,
    in_one_piece: Callable[[str, torch.Tensor], torch.Tensor] = lambda _, gradient: gradient,
    **options: bool,
) -> list[list[int]]:
    """Two ranks do what one does, in float32; returns their tokens.

    Args:
        model: a built-in architecture, or `package.module:factory`.
        checkpoint: in Hugging Face format, of float32 tensors.
        in_one_piece: a gathered gradient by its name, in the order that one rank has.
        options: of the engine with two ranks.
    """
    (alone,) = run(1, model, checkpoint, "float32")
    ranks = run(2, model, checkpoint, "float32", **options)
    for rank in ranks:
        assert rank["tokens"] == alone["tokens"]
        assert rank["equal"] == COMPARED
        halves = [n for n, shape in rank["shapes"].items() if shape != alone["shapes"][n]]
        assert len(halves) > len(rank["shapes"]) // 3
        found = differences(rank, alone, in_one_piece)
        print(f"MEASURED {model}", {what: f"{value:.1e}" for what, value in found.items()})
        assert all(found[what] <= most for what, most in AT_MOST.items()), found
        check_round_trip(rank["exported"], checkpoint)
    assert ranks[0]["logprobs"] == ranks[1]["logprobs"]
    tokens: list[list[int]] = ranks[0]["tokens"]
    return tokens


def differences(
    rank: dict[str, Any],
    alone: dict[str, Any],
    in_one_piece: Callable[[str, torch.Tensor], torch.Tensor],
) -> dict[str, float]:
    """How far a rank is from one rank alone: the largest of each kind in `AT_MOST`."""
    served = zip(rank["logprobs"], alone["logprobs"], strict=True)
    apart = [abs(m - o) for pair in served for m, o in zip(*pair, strict=True)]
    gradients = [
        relative_error(in_one_piece(name, rank["grads"][name]), grad)
        for name, grad in alone["grads"].items()
    ]
    return {
        "loss": abs(rank["loss"] / alone["loss"] - 1),
        # Python's max would lose a NaN.
        "gradients": float(torch.tensor(gradients).max()),
        "log-probabilities": float(torch.tensor(apart).max()),
    }


def check_round_trip(exported: dict[str, torch.Tensor], checkpoint: Path) -> None:
    """The exported tensors are those of the checkpoint, by name and bit."""
    tensors = load_file(checkpoint / "model.safetensors")
    assert exported.keys() == tensors.keys()
    assert all(torch.equal(exported[name], tensors[name]) for name in tensors)
