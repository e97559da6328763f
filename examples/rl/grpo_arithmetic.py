"""Teach a small Qwen3 to add with GRPO, on the very module that vLLM serves.

A short supervised warm-up brings sampled answers to a quarter right. Then, step by step, the
engine samples answers, right ones are rewarded, and one policy-gradient step follows on the
same module. Engine and trainer give the same log-probabilities, so nothing corrects for a
difference between them; the script measures it at every step and stops if it is not 0.
With `--two-processes` the engine runs in another process and `push_weights` brings it the weights.

As a script::

    python -m examples.rl.grpo_arithmetic            # sums of two digits, minutes on two cores
    python -m examples.rl.grpo_arithmetic --quick    # sums of one digit
    python -m examples.rl.grpo_arithmetic --quick --two-processes

Exits with 1 if the reward did not rise as far as it should.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from rich.console import Console

from examples.environment import settle_environment
from examples.rl.report import Report, Step, plot, progress_bar

if TYPE_CHECKING:
    import torch

PLOT = "training.png"
WINDOW = 10
"""Steps over which the first and the last reward are averaged."""
START = 0.25
"""Mean reward that ends the warm-up."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A task's size and how long it is trained."""

    digits: int
    steps: int
    learning_rate: float
    """Of the first step; it falls linearly to 0."""
    goal: float
    """How far the mean reward has to rise."""
    problems: int = 64
    warm_up_rate: float = 3e-3
    warm_up_batch: int
    warm_up_check: int = 20
    """Steps of the warm-up between two looks at the reward."""
    warm_up_limit: int = 800


FULL = Settings(digits=2, steps=200, learning_rate=6e-4, goal=0.3, warm_up_batch=256)
QUICK = Settings(
    digits=1, steps=50, learning_rate=1e-3, goal=0.15, warm_up_batch=128, warm_up_check=10
)


class Trainer:
    """One policy, served by an engine and trained in place.

    Args:
        llm: a `TrainableLLM`, or a `TwoProcesses`.
        settings: sizes and rates.
        seed: of the problems.
    """

    def __init__(self, llm: Any, settings: Settings, seed: int) -> None:
        import torch

        from vllm_graft import ServedOptimizer

        self._llm = llm
        self._settings = settings
        self._generator = random.Random(seed)  # noqa: S311
        # The served weights are bf16; the optimizer keeps float32 masters of them.
        self._optimizer = ServedOptimizer(
            llm.model.parameters(), torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=0.0
        )

    def warm_up(self, console: Console) -> float:
        """Imitate right answers until sampled ones are right often enough; returns how often.

        Raises:
            RuntimeError: that did not happen within the limit.
        """
        from examples.rl.grpo import imitation, roll_out

        limit, check = self._settings.warm_up_limit, self._settings.warm_up_check
        with progress_bar(console) as progress:
            task = progress.add_task("warm-up", total=limit, note="")
            for step in range(1, limit + 1):
                loss = imitation(self._llm, self._draw(self._settings.warm_up_batch))
                self._update(loss, self._settings.warm_up_rate * min(step / 20, 1.0))
                progress.update(task, advance=1)
                if step % check == 0:
                    reward = roll_out(self._llm, self._draw(32)).rewards.mean().item()
                    progress.update(task, note=f"loss {loss.item():.2f}, reward {reward:.2f}")
                    if reward >= START:
                        return reward
        raise RuntimeError(f"warm-up: mean reward {reward:.2f} after {limit} steps, not {START}")

    def step(self, number: int) -> Step:
        """Sample, reward, compare, learn."""
        from examples.rl.grpo import policy_gradient, roll_out

        started = time.monotonic()
        rollout = roll_out(self._llm, self._draw(self._settings.problems))
        loss, mismatch = policy_gradient(self._llm, rollout)
        left = 1 - (number - 1) / self._settings.steps
        self._update(loss, self._settings.learning_rate * left)
        seconds = time.monotonic() - started
        tokens = sum(map(len, rollout.logprobs))
        return Step(
            step=number,
            reward=rollout.rewards.mean().item(),
            loss=loss.item(),
            kl=mismatch.kl,
            unequal=mismatch.unequal,
            tokens=tokens,
            tokens_per_second=tokens / seconds,
            seconds=seconds,
        )

    def _draw(self, count: int) -> list[Any]:
        from examples.rl.arithmetic import draw

        return draw(self._generator, count, self._settings.digits)

    def _update(self, loss: torch.Tensor, learning_rate: float) -> None:
        import torch

        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._llm.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()


def train(
    folder: Path, settings: Settings, seed: int, console: Console, two_processes: bool = False
) -> list[Step]:
    """Warm up and train; checkpoint, metrics and plot go to `folder`.

    Raises:
        RuntimeError: engine and trainer differ, or the warm-up failed.
    """
    from examples.rl.policy import live_policy, write_checkpoint
    from examples.rl.two_processes import two_process_policy

    checkpoint = write_checkpoint(folder / "checkpoint", seed)
    policy = two_process_policy if two_processes else live_policy
    with policy(checkpoint, seed) as llm:
        trainer = Trainer(llm, settings, seed)
        console.print(f"warm-up ended at mean reward {trainer.warm_up(console):.2f}")
        with Report(folder, settings.steps, console) as report:
            for number in range(1, settings.steps + 1):
                report.add(trainer.step(number))
                refuse_mismatch(report.steps[-1])
    plot(report.steps, folder / PLOT)
    return report.steps


def refuse_mismatch(step: Step) -> None:
    """Raise unless engine and trainer agree in every token, bit for bit."""
    if step.unequal or step.kl != 0.0:
        raise RuntimeError(
            f"step {step.step}: {step.unequal} of {step.tokens} log-probabilities differ between "
            f"engine and trainer, KL {step.kl:.3g}"
        )


def rise(steps: Sequence[Step]) -> tuple[float, float]:
    """Mean rewards of the first and of the last `WINDOW` steps."""
    rewards = [step.reward for step in steps]
    return mean(rewards[:WINDOW]), mean(rewards[-WINDOW:])


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.rl.grpo_arithmetic", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--steps", type=int, help="policy-gradient steps (default 200, quick 50)")
    parser.add_argument("--quick", action="store_true", help="one-digit sums, half a minute")
    parser.add_argument(
        "--two-processes", action="store_true", help="sample in another process, push weights"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/rl"), help="folder for results")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.steps is not None and arguments.steps < 2 * WINDOW:
        parser.error(
            f"--steps {arguments.steps}: rewards are averaged over {WINDOW} steps at each "
            f"end; use at least {2 * WINDOW}"
        )
    return arguments


def main() -> None:
    """Train, report, and exit with 1 when the goal is missed."""
    arguments = parse_arguments()
    settle_environment()
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    settings = QUICK if arguments.quick else FULL
    settings = replace(settings, steps=arguments.steps or settings.steps)
    console, started = Console(highlight=False), time.monotonic()
    steps = train(arguments.output, settings, arguments.seed, console, arguments.two_processes)
    first, last = rise(steps)
    tokens = sum(step.tokens for step in steps)
    console.print(
        f"mean reward {first:.3f} -> {last:.3f}; KL 0 at {len(steps)} of {len(steps)} steps, "
        f"{tokens:,} tokens equal; {time.monotonic() - started:.0f} s; {arguments.output}"
    )
    if last - first < settings.goal:
        console.print(f"goal missed: the reward was to rise by {settings.goal}")
        sys.exit(1)


if __name__ == "__main__":
    main()
