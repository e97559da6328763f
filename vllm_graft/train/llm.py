"""`TrainableLLM`: a vLLM engine and the module that it serves, in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from vllm import LLM, SamplingParams

from vllm_graft.serve import _vllm_engine
from vllm_graft.train.live import LiveModule
from vllm_graft.train.options import engine_options


class TrainableLLM(LLM):  # type: ignore[misc]
    """`vllm.LLM` whose `model` is trained in place: one copy of the weights.

    `model` is what the factory returned, an ordinary trainable module. Whatever writes
    into its parameters (an optimizer, `load_state_dict`, `copy_`, `.data`), the next
    generation uses the new values, and keys and values that old ones made are dropped.

    Requests in flight when weights change go on: their keys and values are computed anew
    by the new weights, the tokens they have stay. Every reported log-probability is the one
    of the weights that sampled the token. Writes through `.data` are noticed when no
    request is running, or by `weights_changed()`.

    Under tensor parallelism the script runs under `torchrun`, one process per rank;
    every rank makes the same calls and holds its shard.

    Args:
        model: checkpoint folder.
        factory: `factory(vllm_config, parallel_context) -> nn.Module`, or "module:attr".
        arch: a registered architecture instead, or the name to register `factory` under.
        exact: log-probabilities do not depend on how tokens were batched.
        **options: anything that `vllm.LLM` takes.

    Raises:
        ValueError: neither `factory` nor `arch`, or tensor parallelism without torchrun.
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
        with _vllm_engine.in_this_process():
            super().__init__(str(model), **engine_options(factory, arch, exact, options))
        core = _vllm_engine.core_of(self.llm_engine)
        self.live = LiveModule(core)
        self.model: nn.Module = self.live.model
        _vllm_engine.before_each_step(core, self._ready)
        _vllm_engine.free_graphs_at_end(core)

    def weights_changed(self) -> None:
        """Say that weights changed: nothing computed with the old ones is used again.

        Needed only for writes that escape tensor versions (`.data`, foreign code on the
        same memory) while requests are running.
        """
        self.live.weights_changed()

    def token_logprobs(
        self,
        sequences: Sequence[Sequence[int]],
        prompt_lens: Sequence[int],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[torch.Tensor]:
        """Differentiable log-probabilities of the tokens after each prompt.

        Equal, bit for bit, to what the engine reports for tokens that it sampled with these
        weights, in the engine's `logprobs_mode` (`raw_logprobs` or `processed_logprobs`).

        Args:
            sequences: B token lists, prompt and completion.
            prompt_lens: how many tokens of each are its prompt.
            sampling_params: those of the generation, one for all or one each; they matter
                in `processed_logprobs` mode. Default: the model's own.

        Returns:
            B float32 tensors, one number per token after the prompt.

        Raises:
            ValueError: lengths, tokens or parameters that no generation can have had.
        """
        params = self.get_default_sampling_params() if sampling_params is None else sampling_params
        return self.live.token_logprobs(sequences, prompt_lens, params)

    def _ready(self, idle: bool) -> bool:
        try:
            self.live.take_up_changes(thorough=idle)
        except Exception:
            _vllm_engine.abort_all(self.llm_engine)
            raise
        return True
