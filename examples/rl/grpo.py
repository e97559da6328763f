"""GRPO with one copy of the policy: what samples is what is trained, so no ratio corrects it.

Legend: P problems, S samples of each, T sampled tokens of all P x S completions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm import SamplingParams

from examples.rl.arithmetic import MAX_ANSWER, Sum

SAMPLES = 8
"""Completions of each problem, whose rewards are compared with one another."""


@dataclass(frozen=True)
class Rollout:
    """Completions by the engine, problem by problem."""

    sequences: list[list[int]]
    """P x S token lists, prompt and completion."""
    prompt_lens: list[int]
    logprobs: list[torch.Tensor]
    """P x S float32 tensors: of the sampled tokens, as the engine reported them."""
    rewards: torch.Tensor
    """`[P, S]` float32."""


def roll_out(
    llm: Any, problems: Sequence[Sum], reward: Callable[[Sum, Any], float] = Sum.reward
) -> Rollout:
    """Sample `SAMPLES` completions of every problem at temperature 1."""
    sampling = SamplingParams(n=SAMPLES, temperature=1.0, max_tokens=MAX_ANSWER, logprobs=0)
    outputs = llm.generate([p.prompt for p in problems], sampling, use_tqdm=False)
    pairs = [(output, c) for output in outputs for c in output.outputs]
    rewards = [reward(p, c) for p, o in zip(problems, outputs, strict=True) for c in o.outputs]
    return Rollout(
        sequences=[[*output.prompt_token_ids, *c.token_ids] for output, c in pairs],
        prompt_lens=[len(output.prompt_token_ids) for output, _ in pairs],
        logprobs=[_reported(c) for _, c in pairs],
        rewards=torch.tensor(rewards).view(-1, SAMPLES),
    )


def _reported(completion: Any) -> torch.Tensor:
    pairs = zip(completion.token_ids, completion.logprobs, strict=True)
    return torch.tensor([step[token].logprob for token, step in pairs])


def advantages(rewards_PS: torch.Tensor) -> torch.Tensor:
    """Rewards `[P, S]` against the mean of their problem, in units of its spread."""
    centred = rewards_PS - rewards_PS.mean(-1, keepdim=True)
    return centred / (rewards_PS.std(-1, keepdim=True) + 1e-4)


@dataclass(frozen=True)
class Mismatch:
    """How far the trainer's log-probabilities are from the engine's."""

    unequal: int
    """Tokens that have another log-probability."""
    kl: float
    """Divergence in nats per token, estimated on the sampled tokens by `r - 1 - log r` with
    r the trainer's probability over the engine's: no term is negative."""


def compare(engine_T: torch.Tensor, trainer_T: torch.Tensor) -> Mismatch:
    """Compare float32 log-probabilities `[T]` of the same tokens."""
    log_ratio_T = trainer_T.double() - engine_T.double()
    kl = (log_ratio_T.expm1() - log_ratio_T).mean().item()
    return Mismatch(int((engine_T != trainer_T).sum()), kl)


def policy_gradient(llm: Any, rollout: Rollout) -> tuple[torch.Tensor, Mismatch]:
    """The loss of one on-policy step, and the trainer compared with the engine."""
    trained = llm.token_logprobs(rollout.sequences, rollout.prompt_lens)
    lengths = torch.tensor([len(each) for each in trained])
    weights_T = advantages(rollout.rewards).flatten().repeat_interleave(lengths)
    logprobs_T = torch.cat(trained)
    mismatch = compare(torch.cat(rollout.logprobs), logprobs_T.detach())
    return -(weights_T * logprobs_T).mean(), mismatch


def imitation(llm: Any, problems: Sequence[Sum]) -> torch.Tensor:
    """The supervised loss: cross entropy of the right answers, in nats per token."""
    tokenizer = llm.get_tokenizer()
    prompts = tokenizer([p.prompt for p in problems])["input_ids"]
    answers = tokenizer([p.answer for p in problems])["input_ids"]
    sequences = [[*p, *a, tokenizer.eos_token_id] for p, a in zip(prompts, answers, strict=True)]
    return -torch.cat(llm.token_logprobs(sequences, [len(p) for p in prompts])).mean()
