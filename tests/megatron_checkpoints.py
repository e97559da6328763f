"""Tiny checkpoints of the families that Megatron's example serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.moe_checkpoints import deepseek_v3_checkpoint
from tests.support import QWEN3_SIZES, spread_weights


def llama_checkpoint(folder: Path, **overrides: Any) -> Path:
    """A small random Llama in Hugging Face format (float32), with Llama 3's RoPE scaling."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(**(QWEN3_SIZES | {"rope_parameters": rope} | overrides))
    spread_weights(LlamaForCausalLM(config)).save_pretrained(folder)
    return folder


def qwen2_checkpoint(folder: Path, **overrides: Any) -> Path:
    """A small random Qwen2, whose Q, K and V have biases, in Hugging Face format (float32)."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {name: size for name, size in QWEN3_SIZES.items() if name != "head_dim"}
    config = Qwen2Config(**(sizes | overrides))
    spread_weights(Qwen2ForCausalLM(config)).save_pretrained(folder)
    return folder


def deepseek_checkpoint(folder: Path, **overrides: Any) -> Path:
    """A small random DeepSeek V3 without experts, in Hugging Face format (float32)."""
    return deepseek_v3_checkpoint(folder, first_k_dense_replace=3, **overrides)
