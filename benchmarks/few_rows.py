"""Time of packed products by their number of rows, weights read from memory.

    PYTHONPATH=. python benchmarks/few_rows.py

The products of a decode step of a 0.5B Qwen3 (28 layers, without the head) in bf16, by weights of
their own: oneDNN's as vLLM calls it, and Graft's. In turns; prints JSON: for each number of rows
the medians of milliseconds a step and their ratio.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median

import torch

from vllm_graft.kernels import packed_bf16
from vllm_graft.products import Copy, Kernel
from vllm_graft.serve._vllm_packed import OneDnn, PackedBf16

SHAPES = ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072))
"""Outputs and inputs: queries, keys and values; their output; gate and up; down."""
LAYERS = 28
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 256, 512)
CHUNK = 512

Weights = list[tuple[int, int, Copy]]
"""Outputs, inputs and packed copy of each."""


def pack(kernel: Kernel) -> Weights:
    """Weights of all layers."""
    return [(outputs, width, kernel.pack([torch.randn(outputs, width, dtype=torch.bfloat16)]))
            for _ in range(LAYERS) for outputs, width in SHAPES]  # fmt: skip


def step_ms(kernel: Kernel, weights: Weights, rows: int) -> float:
    """One product by each weight."""
    inputs = {width: torch.randn(rows, width, dtype=torch.bfloat16) for _, width in SHAPES}
    start = time.perf_counter()
    for outputs, width, copy in weights:
        kernel.multiply(inputs[width], None, copy.handle, [outputs])
    return 1e3 * (time.perf_counter() - start)


@torch.no_grad()
def main() -> None:
    """Pack, then measure each number of rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    if not packed_bf16.available():
        raise SystemExit("this machine has no products of Graft's own")
    kernels = {"oneDNN": OneDnn(exact=False), "Graft": PackedBf16(CHUNK)}
    weights = {name: pack(kernel) for name, kernel in kernels.items()}
    for rows in ROWS:
        times: dict[str, list[float]] = {name: [] for name in kernels}
        for _ in range(rounds):
            for name, kernel in kernels.items():
                times[name].append(step_ms(kernel, weights[name], rows))
        medians = {name: round(median(of), 2) for name, of in times.items()}
        ratio = round(median(a / b for a, b in zip(*times.values(), strict=True)), 3)
        print(json.dumps({"rows": rows, **medians, "oneDNN over Graft": ratio}), flush=True)


if __name__ == "__main__":
    main()
