"""What the machine allows: memory bandwidth, products, and what a decode step has to read.

As a script: `python -m vllm_graft.bench.ceilings DTYPE` measures and prints JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

_BYTES = 1 << 30
_SIDE = 4096
_ROWS = 512
_TRIES = 8


def ceilings(checkpoint: Path, dtype: str, env: dict[str, str]) -> dict[str, Any]:
    """Bandwidth and product speed of this machine, and the model's weights in `dtype`.

    Args:
        checkpoint: folder with safetensors files.
        dtype: as vLLM's flag, "auto" being bfloat16.
        env: of the measuring process.

    Returns:
        `bytes_per_s`, `flops_per_s`, and `weights`, the numbers that a decode step reads and
        a token is multiplied by; None for a mixture of experts, which reads what it routes to.
    """
    dtype = "bfloat16" if dtype == "auto" else dtype
    command = [sys.executable, "-m", __name__, dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)  # noqa: S603
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**measured, "weights": weights_read(checkpoint)}


def weights_read(checkpoint: Path) -> int | None:
    """Numbers in the weights of `checkpoint` less those that are looked up, not multiplied by."""
    shapes = {
        name: shape for file in checkpoint.glob("*.safetensors") for name, shape in _header(file)
    }
    if not shapes or any(".experts." in name for name in shapes):
        return None
    tied = not any("lm_head" in name for name in shapes)
    return sum(prod(shape) for name, shape in shapes.items() if tied or "embed_tokens" not in name)


def _header(file: Path) -> list[tuple[str, list[int]]]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        return [(name, tensors.get_slice(name).get_shape()) for name in tensors.keys()]  # noqa: SIM118


def decode_limit(found: dict[str, Any], batch_size: int) -> float | None:
    """Tokens per second if a step did nothing but read the weights and multiply by them."""
    if found["weights"] is None:
        return None
    reading = found["weights"] * found["bytes_per_number"] / found["bytes_per_s"]
    multiplying = 2 * found["weights"] * batch_size / found["flops_per_s"]
    return float(batch_size / max(reading, multiplying))


def prefill_limit(found: dict[str, Any]) -> float | None:
    """Prompt tokens per second if nothing but the products by the weights took time."""
    if found["weights"] is None:
        return None
    return float(found["flops_per_s"] / (2 * found["weights"]))


def _best(work: Callable[[], Any]) -> float:
    def once() -> float:
        begun = time.perf_counter()
        work()
        return time.perf_counter() - begun

    return min(once() for _ in range(_TRIES))


def main(dtype: str) -> None:
    """Measure on PyTorch's threads; the best of several tries."""
    import torch
    import torch.nn.functional as F

    kind = getattr(torch, dtype)
    memory = torch.ones(_BYTES // 4)
    reading = _best(memory.sum)
    x, weight = torch.randn(_ROWS, _SIDE).to(kind), torch.randn(_SIDE, _SIDE).to(kind)
    with torch.inference_mode():
        multiplying = _best(lambda: F.linear(x, weight))
    flops = 2 * _ROWS * _SIDE * _SIDE
    found = {"bytes_per_s": _BYTES / reading, "flops_per_s": flops / multiplying}
    print(json.dumps({**found, "bytes_per_number": kind.itemsize}))


if __name__ == "__main__":
    main(sys.argv[1])
