"""One rank of vLLM's own model: greedy tokens in float32, as `stock_worker.py CHECKPOINT RESULT`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from tests.serve.moe_checks import LENGTHS
from tests.serve.test_deepseek_v3 import STOCK
from tests.support import engine, generate, prompts


def main() -> None:
    """Write the tokens to RESULT."""
    checkpoint, result = sys.argv[1:]
    with engine(
        Path(checkpoint), dtype="float32", seed=0,
        tensor_parallel_size=int(os.environ["WORLD_SIZE"]),
        distributed_executor_backend="external_launcher", **STOCK,
    ) as llm:  # fmt: skip
        tokens = [list(c.token_ids) for c in generate(llm, prompts(LENGTHS))]
        if os.environ["RANK"] == "0":
            Path(result).write_text(json.dumps(tokens))


if __name__ == "__main__":
    main()
