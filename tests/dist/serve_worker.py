"""One rank: serve a checkpoint under tensor parallelism, train on what was generated.

Run by torchrun: `serve_worker.py MODEL CHECKPOINT DTYPE RESULT OPTIONS`, MODEL being a
built-in architecture or `package.module:factory`, OPTIONS those of the engine in JSON. With
the external launcher every rank holds its live module shard, so serving and training meet here.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch
import torch.distributed as dist
from vllm.compilation.counter import compilation_counter

import vllm_graft
from tests.serve.moe_checks import LENGTHS
from tests.serve.test_exactness import count_equal
from tests.support import (
    engine,
    gathered_gradient,
    generate,
    live_module,
    prompts,
    sampled_logprobs,
)
from vllm_graft.serve.registry import BUILT_IN
from vllm_graft.weights.shards import local


def main() -> None:
    """Write what this rank saw to RESULT.rank."""
    model, checkpoint, dtype, result, options = sys.argv[1:]
    arch = model if model in BUILT_IN else "Mine"
    vllm_graft.register(arch, BUILT_IN.get(model, model))
    size = int(os.environ["WORLD_SIZE"])
    with engine(
        Path(checkpoint), arch, dtype=dtype, seed=0, tensor_parallel_size=size,
        distributed_executor_backend="external_launcher", **json.loads(options),
    ) as llm:  # fmt: skip
        tokens = prompts(LENGTHS, llm.llm_engine.model_config.get_vocab_size())
        module = live_module(llm)
        made = generate(llm, tokens)
        equal = count_equal(module, tokens, made)
        hidden = module(torch.arange(40)[None])
        loss = module.compute_logits(hidden).float().log_softmax(-1)[..., 7].mean()
        loss.backward()
        grads = {name: gathered_gradient(p) for name, p in module.named_parameters()}
        saved = {
            "tokens": [list(c.token_ids) for c in made],
            "logprobs": [sampled_logprobs(c) for c in made],
            "equal": equal,
            "compiled": compilation_counter.num_aot_compiles,
            "shapes": {name: tuple(local(p).shape) for name, p in module.named_parameters()},
            "loss": float(loss.detach()),
            "grads": grads,
            "exported": dict(vllm_graft.export_weights(module.model, module.name_mapping)),
        }
        torch.save(saved, f"{result}.{dist.get_rank()}")


if __name__ == "__main__":
    main()
