"""Random-weight checkpoints to measure with.

As a script: `python -m vllm_graft.bench.shapes 0.5b FOLDER`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "60m": {
        "model_type": "qwen3",
        "use_sliding_window": False,
        "num_hidden_layers": 12,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "intermediate_size": 1024,
        "vocab_size": 32000,
    },
    "0.5b": {
        "model_type": "qwen3",
        "use_sliding_window": False,
        "num_hidden_layers": 28,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "vocab_size": 32000,
    },
    "1.5b": {
        "model_type": "qwen3",
        "use_sliding_window": False,
        "num_hidden_layers": 28,
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 5504,
        "vocab_size": 32000,
    },
    "deepseek": {
        "model_type": "deepseek_v3",
        "num_hidden_layers": 12,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": 384,
        "intermediate_size": 2816,
        "moe_intermediate_size": 352,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "vocab_size": 32000,
    },
    "tiny": {
        "model_type": "qwen3",
        "use_sliding_window": False,
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 128,
        "vocab_size": 512,
    },
}
"""Hugging Face config fields. `60m`, `0.5b` and `1.5b` are Qwen3s of 61M, 506M and 1,430M
parameters; `deepseek` is a DeepSeek V3
with real MLA head sizes and 16 experts. Embeddings are untied in all."""


def write_checkpoint(shape: str, folder: Path, *, seed: int = 0) -> None:
    """Write a bfloat16 checkpoint with random weights, without a tokenizer.

    Args:
        shape: a key of `SHAPES`.
        folder: made if need be.
        seed: of the weights.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        **SHAPES[shape], max_position_embeddings=4096, tie_word_embeddings=False
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
