"""What vLLM's sampler makes of logits, by its own code (vLLM internals, as `_vllm.py`).

Legend: C rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch


@dataclass(frozen=True)
class SampledRow:
    """One sampled token's circumstances."""

    params: Any
    """`vllm.SamplingParams` of its request."""
    prompt: Sequence[int]
    before: Sequence[int]
    """Tokens of the completion before this one."""


def samples_in_float32(vllm_config: Any) -> bool:
    """Whether the sampler must get float32 logits to give a token the same bits in any batch.

    Model runner V2 widens the logits of a batch if one of its requests needs them processed.
    """
    return bool(getattr(vllm_config, "use_v2_model_runner", False))


def logprobs_kernel(
    vllm_config: Any,
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """By what the engine's sampler reports log-probabilities; None for PyTorch's log-softmax.

    Relies on `use_v2_model_runner` and on `compute_token_logprobs` of that runner, as in 0.32:
    it adds a row up in an order of its own, which is another one for bf16 logits than for
    float32 (see `samples_in_float32`).

    Returns:
        `(logits [C, V], tokens [C])` to float32 `[C]`, without gradient.
    """
    if not samples_in_float32(vllm_config):
        return None
    from vllm.v1.worker.gpu.sample.logprob import compute_token_logprobs

    def kernel(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = compute_token_logprobs(logits.float(), tokens[:, None])[:, 0]
        return out

    return kernel


def processed_logits(logits: torch.Tensor, rows: Sequence[SampledRow]) -> torch.Tensor:
    """The logits `[C, V]` that vLLM samples from, float32, without gradient.

    Relies on `Sampler`, `SamplingMetadata`, `BatchUpdate`, the processors for min-p and
    logit bias, and `apply_top_k_top_p` as they are in 0.31 and 0.32.
    """
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
    from vllm.v1.sample.sampler import Sampler

    metadata = _metadata(logits, rows)
    sampler = Sampler("processed_logprobs")
    out: torch.Tensor = logits.detach().to(torch.float32, copy=True)
    out = sampler.apply_logits_processors(out, metadata, False)
    if not metadata.all_greedy:
        out = sampler.apply_temperature(out, metadata.temperature, metadata.all_random)
        for processor in metadata.logitsprocs.argmax_invariant:
            out = processor.apply(out)
        out = apply_top_k_top_p(out, metadata.top_k, metadata.top_p)
    return out


def _metadata(logits: torch.Tensor, rows: Sequence[SampledRow]) -> Any:
    from vllm.v1.sample.metadata import SamplingMetadata

    params, vocab_size = [row.params for row in rows], logits.shape[1]

    def column(name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor([getattr(p, name) for p in params], dtype=dtype, device=logits.device)

    greedy = [p.temperature < _GREEDY for p in params]
    top_k = [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params]
    some_top_k = any(k < vocab_size for k in top_k)
    return SamplingMetadata(
        temperature=column("temperature"),
        all_greedy=all(greedy),
        all_random=not any(greedy),
        top_p=column("top_p") if any(p.top_p < 1 for p in params) else None,
        top_k=torch.tensor(top_k, dtype=torch.int32, device=logits.device) if some_top_k else None,
        generators={},
        max_num_logprobs=0,
        no_penalties=not any(penalizes(p) for p in params),
        prompt_token_ids=_padded([row.prompt for row in rows], vocab_size).to(logits.device),
        frequency_penalties=column("frequency_penalty"),
        presence_penalties=column("presence_penalty"),
        repetition_penalties=column("repetition_penalty"),
        output_token_ids=[list(row.before) for row in rows],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=_processors(rows, logits.device),
    )


_GREEDY = 1e-5
"""Below this temperature vLLM takes the largest logit."""


def penalizes(params: Any) -> bool:
    """Whether a request has penalties."""
    return bool(
        params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0
    )


def _processors(rows: Sequence[SampledRow], device: torch.device) -> Any:
    from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessors
    from vllm.v1.sample.logits_processor.builtin import (
        LogitBiasLogitsProcessor,
        MinPLogitsProcessor,
    )

    size = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=len(rows)))
    both = [LogitBiasLogitsProcessor(size, device, False), MinPLogitsProcessor(size, device, False)]
    added = [(i, r.params, list(r.prompt), list(r.before)) for i, r in enumerate(rows)]
    for processor in both:
        processor.update_state(BatchUpdate(batch_size=len(rows), removed=[], added=added, moved=[]))
    return LogitsProcessors(both)


def _padded(tokens: Sequence[Sequence[int]], pad: int) -> torch.Tensor:
    longest = max(map(len, tokens))
    return torch.tensor([[*row, *[pad] * (longest - len(row))] for row in tokens])
