"""One of two ranks: changes of the live weights, some of them on rank 1 only.

Run by torchrun: `changes_worker.py CHECKPOINT RESULT`; writes what it saw to RESULT.rank.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import vllm_graft
from tests.serve.test_trainable_llm import both, step, trainable
from tests.support import prompts
from vllm_graft.weights.shards import local

TOKENS = prompts((140, 9))


def refusal(llm: Any) -> str:
    """Why the engine does not generate."""
    try:
        both(llm, TOKENS)
    except vllm_graft.WeightError as error:
        return str(error)
    return "served"


def not_a_number(llm: Any, weight: torch.Tensor, here: bool) -> dict[str, Any]:
    """A NaN in one shard, then the old value."""
    kept = weight[0, 0].item()
    if here:
        weight[0, 0] = float("nan")
    reasons = [refusal(llm), refusal(llm)]
    if here:
        weight[0, 0] = kept
    return {"reasons": reasons, "repaired": both(llm, TOKENS)}


def exchanged(llm: Any, here: bool) -> dict[str, Any]:
    """Another parameter object on one rank, then the old one."""
    norm = llm.model.model.norm
    kept = norm.weight
    if here:
        norm.weight = nn.Parameter(kept.detach().clone())
    reasons = [refusal(llm), refusal(llm)]
    if here:
        norm.weight = kept
    return {"reasons": reasons, "repaired": both(llm, TOKENS)}


def main() -> None:
    """Run and write."""
    checkpoint, result = sys.argv[1:]
    with trainable(checkpoint, tensor_parallel_size=2, seed=0) as llm:
        here = dist.get_rank() == 1
        weight = local(llm.model.model.layers["1"].attention.wo.weight).detach()
        saved: dict[str, Any] = {"first": both(llm, TOKENS)}
        saved["nan"] = not_a_number(llm, weight, here)
        saved["exchanged"] = exchanged(llm, here)
        if here:
            weight.data[3, 5] += 1.0
        saved["one shard through .data"] = both(llm, TOKENS)
        step(llm)
        saved["step"] = both(llm, TOKENS)
        step(llm, fused=True)
        saved["fused step"] = both(llm, TOKENS)
        rank = dist.get_rank()
    Path(f"{result}.{rank}").write_text(json.dumps(saved))


if __name__ == "__main__":
    main()
