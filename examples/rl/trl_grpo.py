"""GRPO by TRL's own trainer on the module that vLLM serves: its weights are never sent.

    python -m examples.rl.trl_grpo --steps 40

TRL trains `llm.model.model`, a Transformers model. It samples and scores through the engine.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer
from vllm import SamplingParams

from examples.rl.arithmetic import MAX_ANSWER, build_tokenizer, draw, likeness
from examples.rl.policy import ENGINE, write_checkpoint
from vllm_graft import TrainableLLM

SAMPLING = SamplingParams(temperature=1.0, max_tokens=MAX_ANSWER, logprobs=0)


class LiveTrainer(GRPOTrainer):  # type: ignore[misc]
    """TRL's trainer over one copy of the policy, with the engine's own log-probabilities.

    It relies on two hooks of TRL 1.16: `rollout_func`, and the method that computes the
    log-probabilities of the loss.

    Args:
        llm: the engine, of a Transformers model.
        **options: anything that `GRPOTrainer` takes, less model and rollout function.

    Attributes:
        differences: per scored token, its log-probability in the loss less the sampled one.
    """

    def __init__(self, llm: TrainableLLM, **options: Any) -> None:
        self.llm = llm
        self.differences: list[float] = []
        super().__init__(model=llm.model.model, rollout_func=rollout, **options)

    def _get_per_token_logps_and_entropies(  # type: ignore[no-untyped-def]
        self, model, input_ids, attention_mask, logits_to_keep, **_
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        """TRL's hook: `[B, L]` ids, prompts padded left and completions right.

        Returns:
            Log-probabilities of the last `logits_to_keep` places, zero in the padding; as
            entropies one-sample estimates, right on average, for TRL's log only; no routing loss.
        """
        real = attention_mask.bool()
        sequences = [ids[keep].tolist() for ids, keep in zip(input_ids, real, strict=True)]
        prompt_lens = real[:, :-logits_to_keep].sum(1).tolist()
        scored = self.llm.token_logprobs(sequences, prompt_lens, SAMPLING)
        logps = pad_sequence(scored, batch_first=True)
        logps = torch.nn.functional.pad(logps, (0, logits_to_keep - logps.shape[1]))
        self._scored = logps.detach()
        return logps, -self._scored, None

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        loss: torch.Tensor = super()._compute_loss(model, inputs)
        difference = self._scored - inputs["sampling_per_token_logps"]
        self.differences += difference[inputs["completion_mask"].bool()].tolist()
        return loss


def rollout(prompts: list[str], trainer: LiveTrainer) -> dict[str, list[Any]]:
    """TRL's `rollout_func`: one completion of each prompt, which TRL has repeated."""
    outputs = trainer.llm.generate(prompts, SAMPLING, use_tqdm=False)
    made = [output.outputs[0] for output in outputs]
    return {
        "prompt_ids": [list(output.prompt_token_ids) for output in outputs],
        "completion_ids": [list(c.token_ids) for c in made],
        "logprobs": [
            [step[t].logprob for t, step in zip(c.token_ids, c.logprobs, strict=True)] for c in made
        ],
    }


def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """TRL's reward function: `likeness` of each completion."""
    return [likeness(made, right) for made, right in zip(completions, answer, strict=True)]


def build_trainer(llm: TrainableLLM, steps: int, output: Path) -> LiveTrainer:
    """TRL's trainer on sums of numbers of one and of two digits."""
    generator = random.Random(0)  # noqa: S311
    sums = [draw(generator, 1, digits)[0] for _ in range(512) for digits in (1, 2)]
    return LiveTrainer(
        llm,
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": s.prompt, "answer": s.answer} for s in sums]),
        processing_class=build_tokenizer(),
        args=GRPOConfig(
            output_dir=str(output),
            max_steps=steps,
            per_device_train_batch_size=128,
            num_generations=8,
            max_completion_length=MAX_ANSWER,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
    )


def rewards_of(trainer: LiveTrainer) -> list[float]:
    """The mean reward of each step that was made."""
    return [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]


def build_llm(checkpoint: Path) -> TrainableLLM:
    """The Transformers model of a checkpoint, served in float32 and trainable."""
    options = ENGINE | {"dtype": "float32"}
    return TrainableLLM(
        str(checkpoint), factory=AutoModelForCausalLM.from_config, seed=0, **options
    )


def main() -> None:
    """Train, then print rewards and the largest difference between trainer and engine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder) / "checkpoint", seed=0)
        llm = build_llm(checkpoint)
        trainer = build_trainer(llm, arguments.steps, Path(folder) / "trl")
        trainer.train()
        llm.llm_engine.engine_core.shutdown()
    rewards, differences = rewards_of(trainer), torch.tensor(trainer.differences)
    print(
        f"rewards {rewards[0]:.3f} to {rewards[-1]:.3f}; tokens {len(differences)}, "
        f"equal {int((differences == 0).sum())}, largest difference {differences.abs().max():.2e}"
    )


if __name__ == "__main__":
    main()
