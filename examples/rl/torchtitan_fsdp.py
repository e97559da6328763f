"""GRPO by TorchTitan's own trainer parts, on two ranks; an engine beside them samples.

    torchrun --nproc-per-node 2 -m examples.rl.torchtitan_fsdp --steps 40

TorchTitan shards the policy (`parallelize_qwen3`: FSDP2, float32 shards, bf16 in the forward),
and its optimizers and schedule train it. The engine is a process of its own that rank 0 starts;
`push_weights` gathers the shards into it before each rollout. A completion's reward is the
share of places where it has the answer's character, so no warm-up is needed.
"""

from __future__ import annotations

import argparse
import random
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed.fsdp import FSDPModule

from examples.environment import settle_environment
from examples.rl.report import Report, Step, plot

if TYPE_CHECKING:
    from examples.rl.grpo import Rollout

PROBLEMS = 32


class Trainer:
    """One rank's shard of the policy, with TorchTitan's optimizers.

    Args:
        checkpoint: of the policy to begin with.
        engine: a `vllm.LLM` that takes weights, on rank 0; None on the others.
        steps: that the schedule is laid out for.
    """

    def __init__(self, checkpoint: Path, engine: Any, steps: int) -> None:
        from examples.rl.two_processes import build_trainer

        self.policy = build_trainer(checkpoint, torch.float32)
        shard(self.policy.model)
        self._engine = engine
        self._optimizers, self._schedulers = build_optimizers(self.policy.model, steps)
        self._problems = random.Random(0)  # noqa: S311 - the same on every rank

    def step(self, number: int) -> Step:
        """Push, sample, reward, compare, learn."""
        started = time.monotonic()
        rollout = self._sample()
        loss, engine_T, trainer_T = self._loss(rollout)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.policy.model.parameters(), 1.0)
        self._optimizers.step()
        self._schedulers.step()
        self._optimizers.zero_grad()
        return self._describe(number, rollout, loss, (engine_T, trainer_T), started)

    def _sample(self) -> Rollout:
        from examples.rl.arithmetic import Sum, draw
        from examples.rl.grpo import roll_out
        from vllm_graft import push_weights

        problems = draw(self._problems, PROBLEMS, digits=1)
        push_weights(self.policy, self._engine)
        made: list[Any] = [None]
        if self._engine is not None:
            made = [roll_out(self._engine, problems, Sum.likeness)]
        dist.broadcast_object_list(made)
        rollout: Rollout = made[0]
        return rollout

    def _loss(self, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """This rank's share of the loss, and its tokens' log-probabilities on both sides."""
        from examples.rl.grpo import advantages
        from examples.rl.two_processes import scored_by

        mine = slice(dist.get_rank(), None, dist.get_world_size())
        trained = scored_by(self._logits, rollout.sequences[mine], rollout.prompt_lens[mine])
        lengths = torch.tensor([len(each) for each in trained])
        weights_T = advantages(rollout.rewards).flatten()[mine].repeat_interleave(lengths)
        trainer_T, tokens = torch.cat(trained), sum(map(len, rollout.logprobs))
        # TorchTitan's FSDP adds gradients up: each rank divides by the tokens of all.
        loss = -(weights_T * trainer_T).sum() / tokens
        return loss, torch.cat(rollout.logprobs[mine]), trainer_T.detach()

    def _logits(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        logits_BLV: torch.Tensor = self.policy.model(tokens[None], positions[None])
        return logits_BLV[0]

    def _describe(
        self,
        number: int,
        rollout: Rollout,
        loss: torch.Tensor,
        sides: tuple[torch.Tensor, torch.Tensor],
        started: float,
    ) -> Step:
        from examples.rl.grpo import compare

        mismatch, share = compare(*sides), len(sides[0])
        sums = torch.tensor([mismatch.unequal, mismatch.kl * share, share, loss.item()]).double()
        dist.all_reduce(sums)
        unequal, kl, tokens, total = sums.tolist()
        seconds = time.monotonic() - started
        return Step(
            step=number,
            reward=rollout.rewards.mean().item(),
            loss=total,
            kl=kl / tokens,
            unequal=int(unequal),
            tokens=int(tokens),
            tokens_per_second=tokens / seconds,
            seconds=seconds,
        )


def shard(titan: Any) -> None:
    """TorchTitan's own FSDP2 over all ranks, in place: float32 shards, bf16 in the forward."""
    from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
    from torchtitan.distributed import ParallelDims
    from torchtitan.models.qwen3.parallelize import parallelize_qwen3

    from vllm_graft.families.torchtitan_tp import use_this_device

    use_this_device()
    parallelism = ParallelismConfig(spmd_backend="partial_dtensor")
    parallelize_qwen3(
        titan,
        parallel_dims=ParallelDims.from_config(parallelism, dist.get_world_size()),
        training=TrainingConfig(),
        parallelism=parallelism,
        compile_config=CompileConfig(enable=False),
        ac_config=None,
        dump_folder="",
    )
    for module in titan.modules():
        if isinstance(module, FSDPModule):
            # Else sums are asked for with a factor of 1, which only NCCL can do.
            module.set_force_sum_reduction_for_comms(True)


def build_optimizers(titan: Any, steps: int) -> tuple[Any, Any]:
    """TorchTitan's optimizers and learning-rate schedulers."""
    from torchtitan.components.optimizer import (
        LRSchedulersContainer,
        OptimizersContainer,
        ParamGroupConfig,
    )

    adamw = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.0}
    groups = [ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs=adamw)]
    config = OptimizersContainer.Config(param_groups=groups, implementation="foreach")
    optimizers = config.build(model_parts=[titan])
    schedule = LRSchedulersContainer.Config(warmup_steps=5, decay_ratio=0.5)
    return optimizers, schedule.build(optimizers=optimizers, training_steps=steps)


def train(folder: Path, steps: int, console: Console) -> list[Step]:
    """Train on all ranks; rank 0 shows and writes what happened."""
    from examples.rl.grpo_arithmetic import PLOT, refuse_mismatch
    from examples.rl.policy import write_checkpoint
    from examples.rl.two_processes import engine_process

    first, checkpoint = dist.get_rank() == 0, folder / "checkpoint"
    if first:
        write_checkpoint(checkpoint, seed=0)
    dist.barrier()
    made: list[Step] = []
    with engine_process(checkpoint, seed=0) if first else nullcontext() as engine:
        trainer = Trainer(checkpoint, engine, steps)
        with Report(folder, steps, console) if first else nullcontext() as report:
            for number in range(1, steps + 1):
                made.append(trainer.step(number))
                if report is not None:
                    report.add(made[-1])
                refuse_mismatch(made[-1])
    if first:
        plot(made, folder / PLOT)
    return made


def main() -> None:
    """Train, and say how the reward rose."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=40, help="policy-gradient steps")
    parser.add_argument("--output", type=Path, default=Path("runs/rl_fsdp"), help="folder")
    arguments = parser.parse_args()
    settle_environment()
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    dist.init_process_group("gloo")
    console = Console(highlight=False, quiet=dist.get_rank() != 0)
    steps = train(arguments.output, arguments.steps, console)
    rewards, window = [s.reward for s in steps], max(1, len(steps) // 4)
    console.print(
        f"mean reward {mean(rewards[:window]):.3f} -> {mean(rewards[-window:]):.3f}; "
        f"KL 0 at {len(steps)} of {len(steps)} steps, "
        f"{sum(s.tokens for s in steps):,} tokens equal; {arguments.output}"
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
