"""One rank: greedy tokens of 16 prompts in float32, as `tokens_worker.py ARCH CHECKPOINT RESULT`.

ARCH is a built-in architecture, or `stock` for vLLM's own model.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import vllm_graft
from tests.serve.moe_checks import LENGTHS
from tests.serve.test_deepseek_v3 import ROPE_WRITTEN_OUT
from tests.support import engine, generate, prompts
from vllm_graft.serve.registry import BUILT_IN


def main() -> None:
    """Write the tokens to RESULT."""
    arch, checkpoint, result = sys.argv[1:]
    stock = arch == "stock"
    if not stock:
        vllm_graft.register(arch, BUILT_IN[arch])
    with engine(
        Path(checkpoint), None if stock else arch, dtype="float32", seed=0,
        tensor_parallel_size=int(os.environ["WORLD_SIZE"]),
        distributed_executor_backend="external_launcher", **(ROPE_WRITTEN_OUT if stock else {}),
    ) as llm:  # fmt: skip
        tokens = [list(c.token_ids) for c in generate(llm, prompts(LENGTHS))]
        if os.environ["RANK"] == "0":
            Path(result).write_text(json.dumps(tokens))


if __name__ == "__main__":
    main()
