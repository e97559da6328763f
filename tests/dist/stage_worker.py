"""One pipeline stage: serve a checkpoint and say what this stage holds.

Run by torchrun: `stage_worker.py CHECKPOINT RESULT`. With the external launcher every rank
holds its live stage.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch
import torch.distributed as dist

import vllm_graft
from examples.custom_models.qwen3_torchtitan import ARCH
from tests.support import adapter, engine, generate, prompts, sampled_logprobs
from vllm_graft.serve.registry import BUILT_IN

LENGTHS = (1, 2, 3, 5, 8, 13, 17, 31, 33, 64, 65, 100, 127, 128, 129, 130)


def main() -> None:
    """Write what this stage saw to RESULT.rank."""
    checkpoint, result = sys.argv[1:]
    vllm_graft.register(ARCH, BUILT_IN[ARCH])
    with engine(
        Path(checkpoint), ARCH, dtype="float32", seed=0,
        pipeline_parallel_size=int(os.environ["WORLD_SIZE"]),
        distributed_executor_backend="external_launcher",
    ) as llm:  # fmt: skip
        made = generate(llm, prompts(LENGTHS), max_tokens=16)
        served = adapter(llm)
        report = served._loading.report
        exported = dict(vllm_graft.export_weights(served.model.model, served.model.name_mapping))
        saved = {
            "tokens": [list(c.token_ids) for c in made],
            "logprobs": [sampled_logprobs(c) for c in made],
            "loaded": set(report.loaded),
            "elsewhere": set(report.elsewhere),
            "cached": [layer.layer_name for layer in served.kv_layers],
            "exported": {name: tensor.clone() for name, tensor in exported.items()},
        }
        torch.save(saved, f"{result}.{dist.get_rank()}")


if __name__ == "__main__":
    main()
