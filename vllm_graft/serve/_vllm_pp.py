"""What Graft uses of vLLM's pipeline parallelism: its division of layers, what stages exchange.

Tested by `tests/contract/test_vllm_pp.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

_KEY = "hidden_states"


def layers_of_stage(num_layers: int, stage: int, stages: int) -> range:
    """The layers of one stage, `VLLM_PP_LAYER_PARTITION` honoured.

    Relies on `get_pp_indices`, by which vLLM counts the layers of a stage too.
    """
    from vllm.distributed.utils import get_pp_indices

    return range(*get_pp_indices(num_layers, stage, stages))


def message(hidden_states: torch.Tensor) -> Any:
    """What vLLM sends to the next stage: `IntermediateTensors` with hidden states `[T, D]`."""
    from vllm.sequence import IntermediateTensors

    return IntermediateTensors({_KEY: hidden_states})


def received(intermediate_tensors: Any) -> torch.Tensor:
    """The hidden states `[T, D]` of the stage before."""
    hidden_states: torch.Tensor = intermediate_tensors[_KEY]
    return hidden_states


def make_receive_buffer_when_eager() -> None:
    """Let a later stage receive in eager mode on CPU.

    vLLM's V1 runner makes the buffer for what it receives in its dummy run, which its CPU
    worker skips when nothing is compiled (0.31, 0.32): the first request then fails in
    `assert self.intermediate_tensors is not None`, for vLLM's own models too. Can go when
    `test_stock_vllm_still_cannot_receive_in_eager_mode` fails. Idempotent.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    stock = GPUModelRunner.sync_and_gather_intermediate_tensors
    if hasattr(stock, "__wrapped__"):
        return

    @functools.wraps(stock)
    def sync_and_gather(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.intermediate_tensors is None:
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )
        return stock(self, *args, **kwargs)

    GPUModelRunner.sync_and_gather_intermediate_tensors = sync_and_gather
