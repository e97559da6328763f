"""The reinforcement-learning example's parts: task, advantages, loss, comparison."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from examples.rl import grpo_arithmetic
from examples.rl.arithmetic import CHARACTERS, MAX_ANSWER, Sum, build_tokenizer, draw
from examples.rl.grpo import Rollout, advantages, compare, policy_gradient
from examples.rl.grpo_arithmetic import refuse_mismatch
from examples.rl.report import Step


def completion(text, reason="stop"):
    return SimpleNamespace(text=text, finish_reason=reason)


def test_only_the_whole_answer_is_rewarded():
    problem = Sum(47, 85)
    assert (problem.prompt, problem.answer) == ("47+85=", "132")
    assert problem.reward(completion("132")) == 1.0
    for wrong in (completion("13"), completion("1320"), completion("132", "length")):
        assert problem.reward(wrong) == 0.0


@pytest.mark.parametrize(("digits", "low", "high"), [(1, 0, 9), (2, 10, 99)])
def test_problems_have_the_digits_asked_for(digits, low, high):
    problems = draw(random.Random(0), 2000, digits)
    numbers = [n for p in problems for n in (p.left, p.right)]
    assert (min(numbers), max(numbers)) == (low, high)
    assert max(len(p.answer) for p in problems) + 1 <= MAX_ANSWER


def test_every_character_is_one_token_and_comes_back():
    tokenizer = build_tokenizer()
    ids = tokenizer(CHARACTERS)["input_ids"]
    assert len(set(ids)) == len(ids) == len(CHARACTERS)
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == CHARACTERS


def test_advantages_compare_samples_of_one_problem_only():
    values = advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))
    # Mean 0.25, standard deviation 0.5; the constant in the denominator is 1e-4.
    assert values[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-3)
    assert values[1].tolist() == [0.0] * 4


def rollout_of(logprobs, rewards):
    sequences = [[1] + [2] * len(each) for each in logprobs]
    return Rollout(sequences, [1] * len(logprobs), logprobs, torch.tensor(rewards))


def test_the_loss_raises_what_was_rewarded():
    weights = [torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([-3.0])]
    weights[1].requires_grad_()
    llm = SimpleNamespace(token_logprobs=lambda sequences, prompt_lens: weights)
    loss, mismatch = policy_gradient(llm, rollout_of([w.detach() for w in weights], [[1.0, 0.0]]))
    loss.backward()
    # Advantages are +-1/sqrt(2), the mean is over 3 tokens.
    expected = 0.5**0.5 / 3
    assert weights[0].grad.tolist() == pytest.approx([-expected] * 2, rel=1e-3)
    assert weights[1].grad.tolist() == pytest.approx([expected], rel=1e-3)
    assert (mismatch.unequal, mismatch.kl) == (0, 0.0)


def step_of(number=1, reward=0.5, kl=0.0, unequal=0):
    return Step(
        step=number, reward=reward, loss=0.0, kl=kl, unequal=unequal,
        tokens=2, tokens_per_second=1.0, seconds=1.0,
    )  # fmt: skip


def test_one_bit_of_difference_is_seen_and_stops_the_run():
    engine = torch.tensor([-0.5, -1.5])
    trainer = torch.nextafter(engine, torch.zeros(2))
    trainer[0] = engine[0]
    mismatch = compare(engine, trainer)
    assert mismatch.unequal == 1
    assert mismatch.kl > 0.0
    step = step_of(number=3, kl=mismatch.kl, unequal=mismatch.unequal)
    with pytest.raises(RuntimeError, match="step 3: 1 of 2 log-probabilities differ"):
        refuse_mismatch(step)


@pytest.mark.parametrize(("last", "status"), [(0.649, 1), (0.651, None)])
def test_the_exit_status_says_whether_the_reward_rose_by_the_goal(monkeypatch, last, status):
    rewards = [0.35] * 10 + [0.0] * 5 + [last] * 10
    steps = [step_of(reward=reward) for reward in rewards]
    monkeypatch.setattr(grpo_arithmetic, "settle_environment", lambda: None)
    monkeypatch.setattr(grpo_arithmetic, "train", lambda *_: steps)
    monkeypatch.setattr("sys.argv", ["grpo_arithmetic"])
    if status is None:
        grpo_arithmetic.main()
    else:
        with pytest.raises(SystemExit) as exit_:
            grpo_arithmetic.main()
        assert exit_.value.code == status
