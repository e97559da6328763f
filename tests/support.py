"""What several test modules need: tiny checkpoints, engines, log-probabilities, references."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import vllm_graft
from vllm_graft.weights.shards import whole

ROOT = Path(__file__).parents[1]
MIXED_LENGTHS = (1, 2, 5, 17, 64, 128, 129, 130, 300)
"""Prompt lengths around one and several KV blocks (128 tokens on CPU)."""


def qwen3_checkpoint(folder: Path, **overrides: Any) -> Path:
    """A small random Qwen3 checkpoint in Hugging Face format (float32)."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(Qwen3Config(**(QWEN3_SIZES | overrides)))
    spread_weights(model).save_pretrained(folder)
    return folder


QWEN3_SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}


def spread_weights(model: Any) -> Any:
    """Random values, wide enough that greedy tokens vary and logits are far from uniform."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        spread = 0.08 if parameter.dim() > 1 else 0.3
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=spread)
    return model


@contextmanager
def engine(checkpoint: Path, arch: str | None = None, **options: Any) -> Iterator[Any]:
    """An in-process vLLM engine on a checkpoint, freed at the end.

    Args:
        checkpoint: Hugging Face folder.
        arch: architecture to serve it as; the checkpoint's own by default.
        options: for `vllm.LLM`; eager, 512 tokens and no tokenizer by default.
    """
    from vllm import LLM

    if options.get("distributed_executor_backend") == "external_launcher":
        _name_shared_memory_by_job()
    defaults = {
        "max_model_len": 512,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
    }
    overrides = {} if arch is None else {"hf_overrides": {"architectures": [arch]}}
    llm = LLM(str(checkpoint), **(defaults | overrides | options))
    try:
        yield llm
    finally:
        # The caller's variable keeps the engine; freed later, it would take the process
        # groups of the next engine down.
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def _name_shared_memory_by_job() -> None:
    """Let torchrun jobs run at the same time: vLLM 0.32 gives the shared memory of all one name."""
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    stock, port = _CPUSHMDistributed.make_group_name, os.environ["MASTER_PORT"]

    def make_group_name(communicator: Any) -> str:
        return f"{stock(communicator)}-{port}"

    _CPUSHMDistributed.make_group_name = staticmethod(make_group_name)


def adapter(llm: Any) -> Any:
    """Graft's adapter inside an in-process engine: what vLLM holds as its model."""
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    return executor.driver_worker.worker.model_runner.model


def live_module(llm: Any) -> Any:
    """The user's module inside an in-process engine."""
    return adapter(llm).model


def prompts(lengths: Sequence[int], vocab_size: int = 512) -> list[list[int]]:
    """Deterministic token prompts of the given lengths."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def generate(llm: Any, token_prompts: list[list[int]], **sampling: Any) -> list[Any]:
    """Completions (token ids and log-probs of the sampled tokens), greedy by default."""
    from vllm import SamplingParams

    defaults = {
        "temperature": 0.0,
        "max_tokens": 64,
        "logprobs": 0,
        "detokenize": False,
        "ignore_eos": True,
    }
    outputs = llm.generate(
        [{"prompt_token_ids": p} for p in token_prompts],
        SamplingParams(**(defaults | sampling)),
        use_tqdm=False,
    )
    return [output.outputs[0] for output in outputs]


def sampled_logprobs(completion: Any) -> list[float]:
    """The engine's log-probability of each sampled token."""
    return [
        entry[token].logprob
        for token, entry in zip(completion.token_ids, completion.logprobs, strict=True)
    ]


def training_logprobs(
    module: Any, token_prompts: list[list[int]], completions: list[list[int]]
) -> list[torch.Tensor]:
    """The training forward's log-probs of the completions, all samples in one packed batch."""
    samples = [p + list(c) for p, c in zip(token_prompts, completions, strict=True)]
    borders = torch.tensor([0, *(len(s) for s in samples)]).cumsum(0)
    tokens = torch.tensor([t for s in samples for t in s])
    with vllm_graft.packed(borders):
        hidden = module(tokens)
    logprobs = torch.log_softmax(module.compute_logits(hidden).float(), dim=-1)
    result = []
    for start, prompt, completion in zip(
        borders.tolist(), token_prompts, completions, strict=False
    ):
        first = start + len(prompt) - 1
        rows = logprobs[first : first + len(completion)]
        result.append(rows.gather(1, torch.tensor(completion)[:, None])[:, 0])
    return result


def reference_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: Sequence[int],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    alibi: Sequence[float] | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention written out, sample by sample, in the precision of its inputs."""
    repeats = q.shape[1] // k.shape[1]
    outputs, start = [], 0
    for length in lengths:
        rows = slice(start, start + length)
        qs, ks, vs = q[rows], *(x[rows].repeat_interleave(repeats, 1) for x in (k, v))
        scores = torch.einsum("inh,jnh->nij", qs, ks) * scale
        distance = torch.arange(length)[:, None] - torch.arange(length)
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        if alibi is not None:
            scores = scores - scores.new_tensor(alibi)[:, None, None] * distance
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks[:, None, None].expand(-1, length, 1)], -1)
        weights = scores.softmax(-1)[..., :length]
        outputs.append(torch.einsum("nij,jnh->inh", weights, vs))
        start += length
    return torch.cat(outputs)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference over the largest wanted value."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).abs().max() / want.abs().max())


def gathered_gradient(parameter: torch.Tensor) -> torch.Tensor:
    """The gradient of the whole parameter, on every rank."""
    grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    shard = getattr(parameter, "graft_shard", None)
    if shard is not None:
        grad.graft_shard = shard
    return whole(grad)


def python(
    code: str, *arguments: str, limit_s: int = 300, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter of this environment, from the repository root."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )
