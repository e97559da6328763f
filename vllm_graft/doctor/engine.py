"""The live engine's full-vocabulary log-probs, path by path. Torch only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from vllm_graft.doctor.sides import LeftOut, Prompts
from vllm_graft.serve import _vllm_engine

_BUDGET = 48
"""Tokens per step that force a prompt into chunks."""
_NEW = 8


@dataclass(frozen=True)
class Rows:
    """What the engine said about one request."""

    tokens: list[int]
    """Prompt and sampled tokens."""
    start: int
    """Position that the first row belongs to."""
    logprobs: torch.Tensor
    """`[n, V]` float32, NaN where the engine gave none."""
    cached: int
    """Prompt tokens that came from the prefix cache."""


def options(max_model_len: int) -> dict[str, Any]:
    """For `vllm.LLM`: float32, and log-probs of the whole vocabulary."""
    return {
        "dtype": "float32", "enforce_eager": True, "max_model_len": max_model_len,
        "max_logprobs": -1, "skip_tokenizer_init": True, "enable_prefix_caching": True,
    }  # fmt: skip


def paths(llm: Any, prompts: Prompts) -> Iterator[tuple[str, list[Rows]]]:
    """Run the prompts on every path that a `TrainableLLM` with `max_logprobs=-1` has."""
    core = _vllm_engine.core_of(llm.llm_engine)
    _vllm_engine.forget_cached(core)
    yield "prefill", prefill(llm, prompts)
    if _vllm_engine.chunks_prompts(core):
        with _vllm_engine.token_budget(core, _BUDGET):
            chunked = prefill(llm, prompts)
        yield "chunked prefill", chunked
    if _vllm_engine.caches_prefixes(core):
        _vllm_engine.forget_cached(core)
        _run(llm, prompts)
        again = _run(llm, prompts)
        yield f"prefix cache, {sum(rows.cached for rows in again)} tokens", again
    yield "decode", _run(llm, prompts, max_tokens=_NEW)
    _vllm_engine.forget_cached(core)
    yield "mixed batch", _run(llm, prompts, one_a_step=True, max_tokens=_NEW)


def absent_paths(llm: Any) -> Iterator[LeftOut]:
    """The paths that `paths` leaves out, and why."""
    core = _vllm_engine.core_of(llm.llm_engine)
    if not _vllm_engine.chunks_prompts(core):
        yield LeftOut("chunked prefill", "vLLM turns it off for this model here")
    if not _vllm_engine.caches_prefixes(core):
        yield LeftOut("prefix cache", "vLLM turns it off for this model here")


def prefill(llm: Any, prompts: Prompts) -> list[Rows]:
    """Run the prompts at once; a row for every token of theirs."""
    return _run(llm, prompts, prompt_logprobs=-1)


def _run(llm: Any, prompts: Prompts, *, one_a_step: bool = False, **options: Any) -> list[Rows]:
    """Greedy; with `one_a_step` later prompts are prefilled while earlier ones decode."""
    engine = llm.llm_engine
    params = type(llm.get_default_sampling_params())(
        **{"max_tokens": 1, "temperature": 0.0, "logprobs": -1, **options},
        ignore_eos=True,
        detokenize=False,
    )
    waiting = list(enumerate(prompts))
    done: dict[str, Any] = {}
    while waiting or engine.has_unfinished_requests():
        count = 1 if one_a_step else len(waiting)
        for index, prompt in waiting[:count]:
            engine.add_request(f"doctor-{index}", {"prompt_token_ids": list(prompt)}, params)
        waiting = waiting[count:]
        done |= {each.request_id: each for each in engine.step() if each.finished}
    vocab_size = llm.model_config.get_vocab_size()
    return [_rows(done[f"doctor-{index}"], vocab_size) for index in range(len(prompts))]


def _rows(output: Any, vocab_size: int) -> Rows:
    prompt, completion = list(output.prompt_token_ids), output.outputs[0]
    before = list(output.prompt_logprobs or [None])[1:]
    entries = [*before, *completion.logprobs]
    table = torch.full((len(entries), vocab_size), float("nan"))
    for row, entry in zip(table, entries, strict=True):
        row[list(entry)] = torch.tensor([each.logprob for each in entry.values()])
    tokens = prompt + list(completion.token_ids)
    return Rows(tokens, len(prompt) - 1 - len(before), table, output.num_cached_tokens or 0)
