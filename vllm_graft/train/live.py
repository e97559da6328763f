"""The module inside a running engine: its changes taken up, its tokens scored. Torch only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vllm_graft.serve import _vllm_engine
from vllm_graft.train.scoring import Scorer
from vllm_graft.train.watch import WeightWatch
from vllm_graft.weights.errors import failure_of


class LiveModule:
    """The served module of an engine in this process.

    Args:
        core: vLLM's `EngineCore`.
    """

    def __init__(self, core: Any) -> None:
        self._core = core
        self._adapter = _vllm_engine.adapter_of(core)
        self.model: nn.Module = self._adapter.model
        self._scorer = Scorer(self._adapter, core.vllm_config)
        self._watch = WeightWatch(self.model)
        self._unchecked = False
        self._adapter.packing.watches = False

    def weights_changed(self) -> None:
        """Treat the weights as changed at the next step."""
        self._unchecked = True

    def token_logprobs(
        self, sequences: Sequence[Sequence[int]], prompt_lens: Sequence[int], params: Any
    ) -> list[torch.Tensor]:
        """See `TrainableLLM.token_logprobs`."""
        return self._scorer.token_logprobs(sequences, prompt_lens, params)

    def take_up_changes(self, *, thorough: bool) -> None:
        """Serve what the module holds now: check it, drop what old weights computed.

        What one rank cannot serve raises on all: the others would wait for it in the forward.

        Args:
            thorough: look for writes that left no trace in tensor versions too.

        Raises:
            WeightError: the weights cannot be served; nothing was dropped.
        """
        failure = failure_of(lambda: self._look(thorough))
        if not _vllm_engine.any_rank(self._unchecked or failure is not None):
            return
        _vllm_engine.raise_on_every_rank(failure or failure_of(self._watch.check_finite))
        self._adapter.packing.changed()
        _vllm_engine.forget_cached(self._core)
        self._unchecked = False

    def _look(self, thorough: bool) -> None:
        self._adapter.check_servable()
        changed = self._watch.changed(thorough=thorough and not self._unchecked)
        self._unchecked |= changed
