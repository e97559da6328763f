"""TRL's GRPOTrainer on the module that an engine serves."""

from __future__ import annotations

from statistics import mean

import pytest
import torch


@pytest.mark.slow
@pytest.mark.engine
def test_the_reward_rises_and_trl_scores_what_was_sampled(tmp_path):
    from examples.rl.policy import write_checkpoint
    from examples.rl.trl_grpo import build_llm, build_trainer, rewards_of

    checkpoint = write_checkpoint(tmp_path / "checkpoint", seed=0)
    llm = build_llm(checkpoint)
    before = {name: value.clone() for name, value in llm.model.state_dict().items()}
    trainer = build_trainer(llm, 20, tmp_path / "trl")
    trainer.train()
    llm.llm_engine.engine_core.shutdown()
    rewards = rewards_of(trainer)
    assert len(rewards) == 20
    assert mean(rewards[-5:]) - mean(rewards[:5]) >= 0.05
    # 128 completions a step, of at least one token.
    assert len(trainer.differences) >= 20 * 128
    assert set(trainer.differences) == {0.0}
    assert not any(
        torch.equal(value, before[name]) for name, value in llm.model.state_dict().items()
    )
