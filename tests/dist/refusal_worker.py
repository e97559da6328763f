"""One rank: start an engine with a factory and print the error, or SERVED.

Run by torchrun: `refusal_worker.py TARGET CHECKPOINT OPTIONS`, the last for the engine, in JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import vllm_graft
from tests.support import engine


def main() -> None:
    """Start the engine under torchrun's ranks."""
    target, checkpoint, options = sys.argv[1:]
    vllm_graft.register("Wrong", target)
    try:
        with engine(
            Path(checkpoint), "Wrong", dtype="float32", seed=0,
            tensor_parallel_size=int(os.environ["WORLD_SIZE"]),
            distributed_executor_backend="external_launcher", **json.loads(options),
        ):  # fmt: skip
            print("SERVED")
    except (ValueError, RuntimeError) as error:
        print(f"REFUSED {error}")


if __name__ == "__main__":
    main()
