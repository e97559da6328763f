"""What every mixture-of-experts model must hold in the engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serve.test_exactness import count_equal
from tests.support import (
    MIXED_LENGTHS,
    engine,
    generate,
    live_module,
    prompts,
    sampled_logprobs,
    training_logprobs,
)
from vllm_graft import packed, record_routing

LENGTHS = (1, 2, 3, 7, 16, 31, 64, 100, 127, 128, 129, 160, 200, 256, 299, 300)


def completions(checkpoint: Path, arch: str | None, lengths=LENGTHS, **options: Any) -> list[Any]:
    """Greedy completions of prompts of these lengths, in float32 if nothing else is said."""
    with engine(checkpoint, arch, **({"dtype": "float32"} | options)) as llm:
        return generate(llm, prompts(lengths))


def assert_equal_tokens(mine: list[Any], stock: list[Any]) -> None:
    """Equal tokens, and log-probs within 1e-3 (fp32, other kernels and summation orders)."""
    for ours, theirs in zip(mine, stock, strict=True):
        assert list(ours.token_ids) == list(theirs.token_ids)
        assert len(ours.token_ids) == 64
        assert sampled_logprobs(ours) == pytest.approx(sampled_logprobs(theirs), abs=1e-3)


def check_exactness(checkpoint: Path, arch: str, **options: Any) -> None:
    """Log-probs of engine and training equal for every sampled token, and for prompts."""
    tokens = prompts(MIXED_LENGTHS)
    with engine(checkpoint, arch, **options) as llm:
        module = live_module(llm)
        sampling = {"temperature": 1.0, "max_tokens": 40}
        together = generate(llm, tokens, **sampling)
        assert count_equal(module, tokens, together) == (360, 360)
        alone = [generate(llm, [prompt], **sampling)[0] for prompt in tokens]
        assert count_equal(module, tokens, alone) == (360, 360)
        one_by_one = [
            count_equal(module, [prompt], [c]) for prompt, c in zip(tokens, together, strict=True)
        ]
        assert one_by_one == [(40, 40)] * len(tokens)
        check_prompts(llm, tokens)


def check_prompts(llm: Any, tokens: list[list[int]]) -> None:
    """The engine's log-probs of the prompts' own tokens equal those of training."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    requests = [{"prompt_token_ids": prompt} for prompt in tokens]
    outputs = llm.generate(requests, sampling, use_tqdm=False)
    trained = training_logprobs(live_module(llm), [t[:1] for t in tokens], [t[1:] for t in tokens])
    for prompt, output, want in zip(tokens, outputs, trained, strict=True):
        entries = zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
        assert [entry[token].logprob for token, entry in entries] == want.tolist()


def check_routing(checkpoint: Path, arch: str, **options: Any) -> int:
    """Engine and training choose the same experts for every token; returns how many tokens."""
    tokens = prompts((1, 5, 64, 130))
    with engine(checkpoint, arch, enable_prefix_caching=False, **options) as llm:
        module = live_module(llm)
        with recorded_rows(module) as alone:
            results = [generate(llm, [prompt], max_tokens=20)[0] for prompt in tokens]
        # The last token of a completion is never run.
        samples = [p + list(c.token_ids)[:-1] for p, c in zip(tokens, results, strict=True)]
        with recorded_rows(module) as trained, torch.no_grad():
            borders = torch.tensor([0, *(len(s) for s in samples)]).cumsum(0)
            with packed(borders):
                module(torch.tensor([token for sample in samples for token in sample]))
        with recorded_rows(module) as together:
            generate(llm, tokens, max_tokens=20)
    for name, routes in trained.items():
        # One prompt after the other, the engine runs the tokens in the order of the samples.
        assert torch.equal(alone[name], routes), name
        assert sorted(together[name].tolist()) == sorted(routes.tolist()), name
        experts = routes[:, 1:].sort(-1).values.unique(dim=0)
        assert len(experts) > 10, "routing must vary for this to mean anything"
    return sum(len(sample) for sample in samples)


@contextmanager
def recorded_rows(module: Any) -> Iterator[dict[str, torch.Tensor]]:
    """`record_routing`, with the token id before the experts of every row: `[T, 1 + K]`."""
    ran: list[torch.Tensor] = []
    # A copy: the engine's token ids live in one buffer.
    handle = module.register_forward_pre_hook(lambda _, args: ran.append(args[0].flatten().clone()))
    rows: dict[str, torch.Tensor] = {}
    try:
        with record_routing(module) as routes:
            yield rows
    finally:
        handle.remove()
    tokens_T1 = torch.cat(ran)[:, None]
    rows |= {name: torch.cat([tokens_T1, ids_TK], 1) for name, ids_TK in routes.items()}
