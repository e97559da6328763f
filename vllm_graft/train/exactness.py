"""`verify_exactness`: the proof that engine and training forward give the same numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vllm_graft.serve import _vllm_engine

_LENGTHS = (1, 2, 5, 17, 64, 128, 129, 130, 300, 1100)
"""Prompt lengths around one and several KV blocks, and past a kernel's tile of keys."""
_BUDGET = 48
"""Tokens per step that force a prompt into chunks."""


@dataclass(frozen=True)
class Path:
    """One way that tokens took through the engine, and how many log-probs were equal."""

    name: str
    equal: int
    total: int


@dataclass(frozen=True)
class ExactnessReport:
    """What `verify_exactness` counted."""

    paths: tuple[Path, ...]

    @property
    def exact(self) -> bool:
        """Whether every log-probability on every path was equal, and there were any."""
        compared = bool(self.paths) and all(path.total for path in self.paths)
        return compared and all(path.equal == path.total for path in self.paths)

    def __str__(self) -> str:
        width = max((len(path.name) for path in self.paths), default=0)
        lines = [f"{p.name:<{width}}  {p.equal:>6} / {p.total}" for p in self.paths]
        equal, total = sum(p.equal for p in self.paths), sum(p.total for p in self.paths)
        return "\n".join([*lines, f"{'all':<{width}}  {equal:>6} / {total}"])


def verify_exactness(
    llm: Any,
    prompts: Sequence[Sequence[int]] | None = None,
    *,
    max_tokens: int = 40,
    show: bool = True,
) -> ExactnessReport:
    """Compare the engine's log-probabilities with `llm.token_logprobs`, path by path.

    Every path samples anew; all its tokens are compared for equality, without tolerance.
    Prefix cache and chunked prefill are left out where the engine has none.

    Args:
        llm: a `TrainableLLM`.
        prompts: token lists; by default random ones of 1 to 1,100 tokens.
        max_tokens: new tokens per prompt and path.
        show: print each path when it is done.

    Returns:
        The counts; `exact` says whether all were equal.
    """
    chosen = _random_prompts(llm, max_tokens) if prompts is None else [list(p) for p in prompts]
    paths = []
    with torch.no_grad():
        for path in _walk(llm, chosen, max_tokens):
            paths.append(path)
            if show:
                print(f"{path.name:<40} {path.equal:>6} / {path.total}", flush=True)  # noqa: T201
    return ExactnessReport(tuple(paths))


def _random_prompts(llm: Any, max_tokens: int) -> list[list[int]]:
    vocab_size = llm.model_config.get_vocab_size()
    longest = llm.model_config.max_model_len - max_tokens
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(0, vocab_size, (min(n, longest),), generator=generator).tolist()
        for n in _LENGTHS
    ]


@dataclass(frozen=True)
class _Served:
    """One completion as the engine reported it."""

    tokens: list[int]
    params: Any
    logprobs: list[float]
    """Of the sampled tokens, and before them of the prompt's where those were asked for."""
    scored_from: int


def _walk(llm: Any, prompts: list[list[int]], max_tokens: int) -> Iterator[Path]:
    core = _vllm_engine.core_of(llm.llm_engine)

    def serve(tokens: list[list[int]], every: int = 0, **options: Any) -> list[_Served]:
        return _sample(llm, tokens, every, {"max_tokens": max_tokens, **options})

    def afresh(tokens: list[list[int]], **options: Any) -> list[_Served]:
        _vllm_engine.forget_cached(core)
        return serve(tokens, **options)

    together = afresh(prompts)
    yield _count(llm, "one batch", together)
    if _vllm_engine.caches_prefixes(core):
        yield _count(llm, "prefix cache", serve(prompts))
    yield _count(llm, "each alone", [serve([p])[0] for p in prompts])
    yield _count(llm, "other order", afresh(prompts[::-1]))
    if _vllm_engine.chunks_prompts(core):
        with _vllm_engine.token_budget(core, _BUDGET):
            yield _count(llm, "chunked prefill", afresh(prompts))
    yield _count(llm, "preempted every 7 steps", afresh(prompts, every=7))
    yield _count(llm, "prompt_logprobs", serve(prompts, prompt_logprobs=0))
    yield _count(llm, "top-k, top-p, min-p, penalties", serve(prompts, **_SAMPLING))
    yield _count(llm, "trainer, one by one", *[[each] for each in together])
    with torch.autocast(next(llm.model.parameters()).device.type, dtype=torch.bfloat16):
        yield _count(llm, "trainer under autocast", together)
    with torch.enable_grad():
        yield _count(llm, "trainer with gradients", together)
        with _recomputing(llm.model):
            yield _count(llm, "trainer, activation checkpointing", together)


@contextmanager
def _recomputing(model: nn.Module) -> Iterator[None]:
    """Activation checkpointing of every layer in the block, as trainers wrap them."""
    stacks = [m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.ModuleDict))]
    layers = {layer for stack in stacks for layer in stack.children()}
    with ExitStack() as undo:
        for layer in layers:
            own, mine = vars(layer).get("forward"), layer.forward
            layer.forward = partial(checkpoint, mine, use_reentrant=False)  # type: ignore[method-assign]
            undo.callback(_restore, layer, own)
        yield


def _restore(layer: nn.Module, own: Any) -> None:
    """Give a layer its forward back: its class's, where `own` is None."""
    if own is None:
        del layer.forward
    else:
        layer.forward = own  # type: ignore[method-assign]


_SAMPLING: dict[str, Any] = {
    "temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.001,
    "presence_penalty": 0.1, "repetition_penalty": 1.1,
}  # fmt: skip


def _sample(
    llm: Any, prompts: list[list[int]], every: int, options: dict[str, Any]
) -> list[_Served]:
    """Completions of all prompts at once; `every` so many steps all are preempted (0: never)."""
    engine, core = llm.llm_engine, _vllm_engine.core_of(llm.llm_engine)
    sampling_params = type(llm.get_default_sampling_params())
    params = sampling_params(logprobs=0, ignore_eos=True, detokenize=False, **options)
    for index, prompt in enumerate(prompts):
        engine.add_request(f"exactness-{index}", {"prompt_token_ids": prompt}, params)
    done: dict[str, Any] = {}
    steps = 0
    while engine.has_unfinished_requests():
        steps += 1
        if every and steps % every == 0:
            _vllm_engine.forget_cached(core)
        done |= {output.request_id: output for output in engine.step() if output.finished}
    return [_served(done[f"exactness-{i}"], params) for i in range(len(prompts))]


def _served(output: Any, params: Any) -> _Served:
    prompt, completion = list(output.prompt_token_ids), output.outputs[0]
    new = list(completion.token_ids)
    logprobs = [entry[t].logprob for t, entry in zip(new, completion.logprobs, strict=True)]
    start = len(prompt)
    if output.prompt_logprobs:
        pairs = zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
        logprobs, start = [entry[t].logprob for t, entry in pairs] + logprobs, 1
    return _Served(prompt + new, params, logprobs, start)


def _count(llm: Any, name: str, *groups: list[_Served]) -> Path:
    """Equal log-probabilities; each group is one packed training batch."""
    pairs: list[tuple[float, float]] = []
    for group in groups:
        trained = llm.token_logprobs(
            [each.tokens for each in group],
            [each.scored_from for each in group],
            [each.params for each in group],
        )
        for each, logprobs in zip(group, trained, strict=True):
            pairs += zip(each.logprobs, logprobs.tolist(), strict=True)
    return Path(name, sum(a == b for a, b in pairs), len(pairs))
