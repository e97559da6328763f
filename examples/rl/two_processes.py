"""The policy in two processes: an engine that samples, and the module that this process trains."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig
from vllm import LLM

from examples.custom_models.qwen3_torchtitan import ARCH, build_qwen3_torchtitan
from examples.rl.policy import ENGINE
from vllm_graft import make_exact, packed, push_weights, register


class TwoProcesses:
    """What the loop needs of a `TrainableLLM`, with the weights pushed before each rollout.

    Args:
        engine: a `vllm.LLM` that takes weights; its engine core is a process of its own.
        model: the same policy here, in the engine's dtype.
    """

    def __init__(self, engine: Any, model: nn.Module) -> None:
        self.model = model
        self._engine = engine

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Sample by the weights that `model` has now."""
        push_weights(self.model, self._engine)
        return self._engine.generate(*args, **kwargs)

    def get_tokenizer(self) -> Any:
        """The checkpoint's."""
        return self._engine.get_tokenizer()

    def token_logprobs(
        self, sequences: Sequence[Sequence[int]], prompt_lens: Sequence[int]
    ) -> list[torch.Tensor]:
        """Differentiable log-probabilities of the tokens after each prompt, by `model`.

        Returns:
            A float32 tensor per sequence.
        """
        return scored_by(self._logits, sequences, prompt_lens)

    def _logits(self, tokens: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model.compute_logits(self.model(tokens))  # type: ignore[operator]
        return logits


def scored_by(
    logits_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    sequences: Sequence[Sequence[int]],
    prompt_lens: Sequence[int],
) -> list[torch.Tensor]:
    """Differentiable log-probabilities of the tokens after each prompt, in one packed forward.

    Args:
        logits_of: tokens `[T]` and positions `[T]` to logits `[T, V]`.

    Returns:
        A float32 tensor per sequence.
    """
    tokens = torch.tensor([token for sequence in sequences for token in sequence])
    with packed(torch.tensor([0, *map(len, sequences)]).cumsum(0)) as batch:
        logits = logits_of(tokens, batch.positions)
    logprobs = logits.log_softmax(-1, dtype=torch.float32)
    chosen = logprobs[:-1].gather(1, tokens[1:, None])[:, 0]  # row i predicts token i + 1
    result, start = [], 0
    for sequence, prompt in zip(sequences, prompt_lens, strict=True):
        end = start + len(sequence)
        result.append(chosen[start + prompt - 1 : end - 1])
        start = end
    return result


@contextmanager
def two_process_policy(checkpoint: Path, seed: int) -> Iterator[TwoProcesses]:
    """The checkpoint served in bf16 by another process; `model` is trained in this one."""
    with engine_process(checkpoint, seed) as engine:
        yield TwoProcesses(engine, build_trainer(checkpoint, torch.bfloat16))


@contextmanager
def engine_process(checkpoint: Path, seed: int) -> Iterator[Any]:
    """A `vllm.LLM` that serves the checkpoint in bf16, its engine core in another process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    register(ARCH, build_qwen3_torchtitan)
    engine = LLM(
        str(checkpoint),
        hf_overrides={"architectures": [ARCH]},
        weight_transfer_config={"backend": "graft_shm"},
        seed=seed,
        **ENGINE,
    )
    try:
        yield engine
    finally:
        engine.llm_engine.engine_core.shutdown()


def build_trainer(checkpoint: Path, dtype: torch.dtype) -> Any:
    """The factory's module outside any engine, with its arithmetic and the checkpoint's weights."""
    config = SimpleNamespace(
        hf_config=AutoConfig.from_pretrained(checkpoint),
        model_config=SimpleNamespace(max_model_len=ENGINE["max_model_len"], dtype=dtype),
    )
    model: Any = build_qwen3_torchtitan(config, None)
    make_exact(model)
    model.load_weights(load_file(checkpoint / "model.safetensors").items())
    return model
