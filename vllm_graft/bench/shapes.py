"""Random-weight Qwen3 checkpoints to measure with.

As a script: `python -m vllm_graft.bench.shapes 0.5b FOLDER`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, int]] = {
    "0.5b": {
        "num_hidden_layers": 28,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "vocab_size": 32000,
    },
    "tiny": {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 128,
        "vocab_size": 512,
    },
}
"""Qwen3 sizes; `0.5b` has 506M parameters, with untied embeddings as the others."""


def write_checkpoint(shape: str, folder: Path, *, seed: int = 0) -> None:
    """Write a bfloat16 Qwen3 checkpoint with random weights, without a tokenizer.

    Args:
        shape: a key of `SHAPES`.
        folder: made if need be.
        seed: of the weights.
    """
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    sizes: dict[str, Any] = dict(SHAPES[shape])
    config = Qwen3Config(
        **sizes, max_position_embeddings=4096, tie_word_embeddings=False, use_sliding_window=False
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def write_in_child(shape: str, folder: Path) -> None:
    """`write_checkpoint` in a process of its own, so that the caller's memory stays small.

    Raises:
        RuntimeError: the process failed; ends with its last words.
    """
    command = [sys.executable, "-m", __name__, shape, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise RuntimeError(f"cannot write the {shape} checkpoint: {done.stderr.strip()[-500:]}")


if __name__ == "__main__":
    write_checkpoint(sys.argv[1], Path(sys.argv[2]))
