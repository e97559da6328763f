"""Pipeline stages: what the adapter receives and sends, and whether the stages fit together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from vllm_graft.parallel import ParallelContext
from vllm_graft.serve import _vllm_pp
from vllm_graft.weights.errors import WeightError

_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Stage:
    """This process's part of the pipeline; the only one where there is none."""

    index: int
    count: int
    width: int
    """D, of the hidden states between stages: `hidden_size` of the checkpoint's config."""
    dtype: torch.dtype
    """Of those hidden states: the served one."""

    @classmethod
    def of(cls, vllm_config: Any) -> Stage:
        """The stage of this process under vLLM's configuration."""
        context = ParallelContext.from_config(vllm_config.parallel_config)
        return cls(
            index=context.get_pipeline_parallel_rank(),
            count=context.get_pipeline_parallel_world_size(),
            width=vllm_config.model_config.get_hidden_size(),
            dtype=vllm_config.model_config.dtype,
        )

    @property
    def first(self) -> bool:
        """Whether it takes token ids."""
        return self.index == 0

    @property
    def last(self) -> bool:
        """Whether it gives the hidden states that become logits."""
        return self.index == self.count - 1

    def sample(self, tokens: int, device: torch.device) -> torch.Tensor | None:
        """Random hidden states `[T, D]` to try a later stage with; None for the first."""
        if self.first:
            return None
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(tokens, self.width, generator=generator, dtype=torch.float32)
        return hidden.to(device, self.dtype)

    def received(self, intermediate_tensors: Any) -> torch.Tensor | None:
        """Hidden states `[T, D]` of the stage before; None on the first."""
        return None if self.first else _vllm_pp.received(intermediate_tensors)

    def sent(self, hidden_states: torch.Tensor) -> Any:
        """What vLLM wants of this stage: hidden states from the last, a message from others."""
        return hidden_states if self.last else _vllm_pp.message(hidden_states)

    def check_sent(self, arch: str, hidden_states: torch.Tensor) -> None:
        """Refuse what the next stage cannot receive.

        Raises:
            RuntimeError: another width or dtype than vLLM's buffer has.
        """
        got = (hidden_states.shape[-1], hidden_states.dtype)
        if got != (self.width, self.dtype):
            raise RuntimeError(
                f"{arch}: stage {self.index} of {self.count} returns hidden states of width "
                f"{got[0]} in {got[1]}; the next stage receives width {self.width} (hidden_size of "
                f"the checkpoint's config) in {self.dtype}"
            )


def check_stages(layers: Iterable[str], elsewhere: Iterable[str], context: ParallelContext) -> None:
    """Refuse stages that do not make up the model. Every rank must call this.

    Args:
        layers: names of this stage's attention layers.
        elsewhere: checkpoint names that this stage left to others.

    Raises:
        RuntimeError: an attention layer is on several stages.
        WeightError: a checkpoint tensor that every stage left to others.
    """
    group = context.get_pp_process_group()
    count = context.get_pipeline_parallel_world_size()
    if count == 1 or group is None:
        return
    stages: list[Any] = [None] * count
    dist.all_gather_object(stages, (set(layers), set(elsewhere)), group=group)
    held = [name for names, _ in stages for name in sorted(names)]
    twice = sorted({name for name in held if held.count(name) > 1})
    if twice:
        raise RuntimeError(
            f"pipeline_parallel_size={count}, but several stages hold {_some(twice)}: build only "
            "the layers in parallel_context.stage_layers(num_layers), OtherStage() for the others"
        )
    unheld = sorted(set.intersection(*(names for _, names in stages)))
    if unheld:
        raise WeightError(f"no pipeline stage holds the checkpoint tensors {_some(unheld)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
