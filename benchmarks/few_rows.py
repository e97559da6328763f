"""Time of packed products by their number of rows, weights read from memory.

    PYTHONPATH=. python benchmarks/few_rows.py --dtype bfloat16

The products of a decode step of a 0.5B Qwen3 (28 layers, without the head), by weights of their
own; prints JSON: rows to milliseconds of a step, the least of seven.
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from vllm_graft.serve._vllm_packed import CpuPacker

SHAPES = ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072))
"""Outputs and inputs: queries, keys and values; their output; gate and up; down."""
LAYERS = 28
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32)


Weights = list[tuple[int, int, torch.Tensor]]
"""Outputs, inputs and handle of each."""


def step_ms(packer: CpuPacker, packed: Weights, rows: int, dtype: torch.dtype) -> float:
    """One product by each weight."""
    inputs = {i: torch.randn(rows, i, dtype=dtype) for _, i in SHAPES}
    start = time.perf_counter()
    for outputs, width, handle in packed:
        packer.multiply(inputs[width], None, handle, outputs)
    return 1e3 * (time.perf_counter() - start)


@torch.no_grad()
def main() -> None:
    """Pack, then measure each number of rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    dtype = getattr(torch, parser.parse_args().dtype)
    packer = CpuPacker(exact=False)
    layers = [(*shape, packer.pack(torch.randn(*shape, dtype=dtype)))
              for _ in range(LAYERS) for shape in SHAPES]  # fmt: skip
    packed = [(outputs, width, kernel.handle) for outputs, width, kernel in layers]
    print(json.dumps({
        rows: min(step_ms(packer, packed, rows, dtype) for _ in range(7)) for rows in ROWS
    }))  # fmt: skip


if __name__ == "__main__":
    main()
