"""What tensor parallelism must hold for every library: tokens, bits, loss, gradients, weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.dist.launch import torchrun
from tests.support import relative_error

COMPARED = (1024, 1024)
"""64 tokens for each of 16 prompts."""


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
        # fp32: row-parallel products add two partial sums.
        assert rank["loss"] == pytest.approx(alone["loss"], rel=1e-6)
        for name, grad in alone["grads"].items():
            assert relative_error(in_one_piece(name, rank["grads"][name]), grad) < 1e-5, name
        for mine, other in zip(rank["logprobs"], alone["logprobs"], strict=True):
            assert mine == pytest.approx(other, abs=1e-5)
        check_round_trip(rank["exported"], checkpoint)
    assert ranks[0]["logprobs"] == ranks[1]["logprobs"]
    tokens: list[list[int]] = ranks[0]["tokens"]
    return tokens


def check_round_trip(exported: dict[str, torch.Tensor], checkpoint: Path) -> None:
    """The exported tensors are those of the checkpoint, by name and bit."""
    tensors = load_file(checkpoint / "model.safetensors")
    assert exported.keys() == tensors.keys()
    assert all(torch.equal(exported[name], tensors[name]) for name in tensors)
