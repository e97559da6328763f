"""vLLM engines in this process, and the training forward of the module they serve."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams

import vllm_graft
from examples.demo.ports import MAX_LENGTH, Port


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One greedy completion."""

    prompt: list[int]
    tokens: list[int]
    log_probs: torch.Tensor
    """`[len(tokens)]` float32, of the tokens that were chosen."""


@contextmanager
def native_engine(checkpoint: Path, port: Port) -> Iterator[Any]:
    """A float32 engine in this process with vLLM's own model."""
    with _engine(checkpoint, **port.native_options) as llm:
        yield llm


@contextmanager
def graft_engine(checkpoint: Path, port: Port) -> Iterator[Any]:
    """The same with TorchTitan's model."""
    vllm_graft.register(port.arch, port.factory)
    with _engine(checkpoint, hf_overrides={"architectures": [port.arch]}) as llm:
        yield llm


@contextmanager
def _engine(checkpoint: Path, **options: Any) -> Iterator[Any]:
    llm = LLM(
        str(checkpoint),
        dtype="float32",
        enforce_eager=True,
        max_model_len=MAX_LENGTH,
        seed=0,
        use_tqdm_on_load=False,
        **options,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def cached_bytes_per_token(llm: Any) -> int:
    """Bytes that the engine's KV cache has for each token it can hold, all layers together."""
    cache = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
    [group] = cache.kv_cache_groups
    tokens = cache.num_blocks * group.kv_cache_spec.block_size
    return sum(int(tensor.size) for tensor in cache.kv_cache_tensors) // int(tokens)


def complete(llm: Any, prompts: list[list[int]], max_tokens: int) -> list[Completion]:
    """Greedy completions of exactly `max_tokens` tokens, all prompts in one batch."""
    greedy = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=0, ignore_eos=True)
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(requests, greedy, use_tqdm=False)
    return [
        _completion(prompt, out.outputs[0]) for prompt, out in zip(prompts, outputs, strict=True)
    ]


def improvise(llm: Any, prompt: str, max_tokens: int = 64) -> str:
    """A text completion to read; the penalty keeps a small model from repeating itself."""
    sampling = SamplingParams(temperature=0, repetition_penalty=1.2, max_tokens=max_tokens)
    [output] = llm.generate([prompt], sampling, use_tqdm=False)
    text: str = output.outputs[0].text
    return text


def _completion(prompt: list[int], output: Any) -> Completion:
    tokens = list(output.token_ids)
    chosen = [step[token].logprob for step, token in zip(output.logprobs, tokens, strict=True)]
    return Completion(prompt=prompt, tokens=tokens, log_probs=torch.tensor(chosen))


def live_module(llm: Any) -> Any:
    """The user's module inside the engine: its parameters are the ones being served."""
    [module] = llm.apply_model(lambda adapter: adapter.model)
    return module


def pack(sequences: list[list[int]]) -> tuple[torch.Tensor, list[int]]:
    """Sequences end to end as `[T]` int64, and their borders."""
    lengths = [len(sequence) for sequence in sequences]
    borders = list(itertools.accumulate(lengths, initial=0))
    return torch.tensor(list(itertools.chain.from_iterable(sequences))), borders


def packed_log_probs(module: Any, sequences: list[list[int]]) -> torch.Tensor:
    """Log-probs `[T, V]` of every next token, by the training forward of all sequences at once."""
    input_ids, borders = pack(sequences)
    with vllm_graft.packed(borders):
        hidden_TD = module(input_ids)
    logits_TV: torch.Tensor = module.compute_logits(hidden_TD)
    return logits_TV.log_softmax(dim=-1, dtype=torch.float32)


def trained_log_probs(module: Any, completions: list[Completion]) -> list[torch.Tensor]:
    """What the training forward gives the engine's tokens, one tensor per completion."""
    table_TV = packed_log_probs(module, [c.prompt + c.tokens for c in completions])
    result, start = [], 0
    for c in completions:
        # Row i predicts token i + 1, so the last token's row is not used.
        first = start + len(c.prompt) - 1
        rows = table_TV[first : first + len(c.tokens)]
        result.append(rows.gather(1, torch.tensor(c.tokens)[:, None])[:, 0].detach())
        start += len(c.prompt) + len(c.tokens)
    return result


def step_live_module(module: Any, sequences: list[list[int]], lr: float) -> float:
    """One AdamW step on the module being served; returns the loss before it."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr)
    table_TV = packed_log_probs(module, sequences)
    input_ids, borders = pack(sequences)
    # The last row of each sequence would predict the first token of the next one.
    predicts = torch.ones(len(input_ids), dtype=torch.bool)
    predicts[torch.tensor(borders[1:]) - 1] = False
    rows = predicts.nonzero()[:, 0]
    loss = -table_TV[rows].gather(1, input_ids[rows + 1][:, None]).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()
