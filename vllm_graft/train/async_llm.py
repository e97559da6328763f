"""`TrainableAsyncLLM`: vLLM's asynchronous engine around a live module, in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from vllm import AsyncEngineArgs, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.executor import Executor

from vllm_graft.serve import _vllm_engine
from vllm_graft.train.live import LiveModule
from vllm_graft.train.options import engine_options


class TrainableAsyncLLM(AsyncLLM):  # type: ignore[misc]
    """`vllm.AsyncLLM` whose `model` is trained in place: one copy of the weights.

    See `TrainableLLM` for what happens when weights change. The engine steps in the event
    loop's own thread, between other tasks: change weights in that thread, and they never
    change in the middle of a step. Weights that cannot be served (NaN, replaced parameters)
    make the requests in flight raise; the engine goes on.

    Args:
        model: checkpoint folder.
        factory, arch, exact: as for `TrainableLLM`.
        **options: anything that `vllm.AsyncEngineArgs` takes.

    Raises:
        ValueError: neither `factory` nor `arch`, or more than one rank.
    """

    def __init__(
        self,
        model: str,
        *,
        factory: Callable[..., nn.Module] | str | None = None,
        arch: str | None = None,
        exact: bool = True,
        **options: Any,
    ) -> None:
        if int(options.get("tensor_parallel_size", 1)) > 1:
            raise ValueError(
                "TrainableAsyncLLM runs on one rank: ranks would have to step in the same order. "
                "Use TrainableLLM under torchrun for tensor parallelism"
            )
        with _vllm_engine.in_this_process(), _vllm_engine.async_in_this_process():
            arguments = AsyncEngineArgs(str(model), **engine_options(factory, arch, exact, options))
            config = arguments.create_engine_config()
            super().__init__(config, Executor.get_class(config), not arguments.disable_log_stats)
        self._core = self.engine_core.engine_core
        self.live = LiveModule(self._core)
        self.model: nn.Module = self.live.model
        _vllm_engine.before_each_step(self._core, self._ready)

    def weights_changed(self) -> None:
        """Say that weights changed; see `TrainableLLM.weights_changed`."""
        self.live.weights_changed()

    def token_logprobs(
        self,
        sequences: Sequence[Sequence[int]],
        prompt_lens: Sequence[int],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[torch.Tensor]:
        """Differentiable log-probabilities; see `TrainableLLM.token_logprobs`."""
        return self.live.token_logprobs(sequences, prompt_lens, sampling_params or SamplingParams())

    def _ready(self, idle: bool) -> bool:
        try:
            self.live.take_up_changes(thorough=idle)
        except Exception as error:
            _vllm_engine.fail_all(self, self._core, error)
            return False
        return True
