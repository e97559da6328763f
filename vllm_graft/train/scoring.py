"""From generations to log-probabilities: checks, then one packed forward. Torch only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vllm_graft.serve._vllm_sampling import (
    Processor,
    SampledRow,
    logits_processor,
    logprobs_kernel,
)
from vllm_graft.train.logprobs import Process, Row, token_logprobs
from vllm_graft.train.sampling import refuse_unsupported, with_gradient

_MODES = ("raw_logprobs", "processed_logprobs")


class Scorer:
    """Scores tokens with the live module behind an adapter, as its engine would.

    Args:
        adapter: Graft's adapter in the engine.
        vllm_config: the engine's.
    """

    def __init__(self, adapter: Any, vllm_config: Any) -> None:
        model_config = vllm_config.model_config
        self._adapter = adapter
        self._kernel = logprobs_kernel(vllm_config)
        self._processor = logits_processor(vllm_config)
        self._vocab_size = model_config.get_vocab_size()
        self._max_len = model_config.max_model_len
        self._mode = model_config.logprobs_mode

    def token_logprobs(
        self, sequences: Sequence[Sequence[int]], prompt_lens: Sequence[int], sampling_params: Any
    ) -> list[torch.Tensor]:
        """See `TrainableLLM.token_logprobs`."""
        if self._mode not in _MODES:
            raise ValueError(
                f"token_logprobs: the engine reports {self._mode}, not log-probabilities; start "
                f"it with logprobs_mode={_MODES[0]!r} or {_MODES[1]!r}"
            )
        self._check(sequences, prompt_lens)
        if not sequences:
            return []
        process = None
        if self._mode == "processed_logprobs":
            params = _one_each(sampling_params, len(sequences))
            process = _process(sequences, prompt_lens, params, self._processor)
        device = next(self._adapter.model.parameters()).device
        scored = token_logprobs(
            self._adapter.training_hidden,
            self._adapter.model.compute_logits,
            sequences,
            prompt_lens,
            vocab_size=self._vocab_size,
            device=device,
            process=process,
            kernel=self._kernel,
        )
        _refuse_impossible(scored, sequences, prompt_lens)
        return scored

    def _check(self, sequences: Sequence[Sequence[int]], prompt_lens: Sequence[int]) -> None:
        if len(sequences) != len(prompt_lens):
            raise ValueError(
                f"token_logprobs: {len(sequences)} sequences but {len(prompt_lens)} prompt_lens"
            )
        for index, (tokens, prompt) in enumerate(zip(sequences, prompt_lens, strict=True)):
            where = f"token_logprobs: sequence {index}"
            if not 1 <= prompt <= len(tokens):
                raise ValueError(
                    f"{where}: prompt_lens is {prompt}, expected 1 to {len(tokens)} (its length)"
                )
            if len(tokens) > self._max_len:
                raise ValueError(
                    f"{where} has {len(tokens)} tokens; the engine's max_model_len is "
                    f"{self._max_len}"
                )
            for position, token in enumerate(tokens):
                if not 0 <= token < self._vocab_size:
                    raise ValueError(
                        f"{where}, position {position}: token {token} is not in the vocabulary of "
                        f"{self._vocab_size}"
                    )


def _one_each(sampling_params: Any, count: int) -> list[Any]:
    if not isinstance(sampling_params, Sequence):
        return [sampling_params] * count
    if len(sampling_params) != count:
        raise ValueError(
            f"token_logprobs: {count} sequences but {len(sampling_params)} sampling_params"
        )
    return list(sampling_params)


def _process(
    sequences: Sequence[Sequence[int]],
    prompt_lens: Sequence[int],
    params: list[Any],
    processor: Processor,
) -> Process:
    for each in params:
        refuse_unsupported(each)

    def process(logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        sampled = [
            SampledRow(
                params[row.sample],
                sequences[row.sample][: prompt_lens[row.sample]],
                sequences[row.sample][prompt_lens[row.sample] : prompt_lens[row.sample] + row.step],
            )
            for row in rows
        ]
        seen = [[*row.prompt, *row.before] for row in sampled]
        values = processor(logits, sampled)
        return with_gradient(logits, values, [row.params for row in sampled], seen)

    return process


def _refuse_impossible(
    scored: list[torch.Tensor], sequences: Sequence[Sequence[int]], prompt_lens: Sequence[int]
) -> None:
    for index, logprobs in enumerate(scored):
        impossible = logprobs.detach().isneginf().nonzero()
        if len(impossible):
            position = prompt_lens[index] + int(impossible[0])
            raise ValueError(
                f"token_logprobs: sequence {index}, position {position}: token "
                f"{sequences[index][position]} has probability 0 under these sampling parameters, "
                "so the engine cannot have sampled it"
            )
