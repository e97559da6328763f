"""The policy: a small Qwen3 of TorchTitan's with random weights, live in an engine."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from examples.custom_models.qwen3_torchtitan import build_qwen3_torchtitan
from examples.rl.arithmetic import build_tokenizer
from vllm_graft import TrainableLLM

MAX_SEQUENCES = 512
"""Completions that the engine samples at the same time."""

ENGINE: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_model_len": 64,
    "max_num_seqs": MAX_SEQUENCES,
    "enforce_eager": True,
    "use_tqdm_on_load": False,
}
"""Options of the engine, in this process or in another."""


def write_checkpoint(folder: Path, seed: int) -> Path:
    """Write config, random weights and tokenizer to `folder` and return it."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def live_policy(checkpoint: Path, seed: int) -> Iterator[TrainableLLM]:
    """The checkpoint served in bf16; `model` is trained in place."""
    llm = TrainableLLM(str(checkpoint), factory=build_qwen3_torchtitan, seed=seed, **ENGINE)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
