"""What vLLM's sampler makes of logits, by its own code (vLLM internals, as `_vllm.py`).

Legend: C rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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


def cut_alike_in_any_batch(vllm_config: Any) -> None:
    """Let top-p keep the same tokens of a row in any batch, where log-probs depend on it.

    Relies on `_SPLIT_MAX_BATCH` of 0.31 and 0.32: batches up to it are cut by another kernel than
    larger ones, which adds probabilities up in parts of a size that follows from the batch. Holds
    for the rest of the process.
    """
    processed = vllm_config.model_config.logprobs_mode == "processed_logprobs"
    if not (processed and samples_in_float32(vllm_config)):
        return
    from vllm.v1.sample.ops import topk_topp_triton

    topk_topp_triton._SPLIT_MAX_BATCH = 0


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


Processor = Callable[[torch.Tensor, Sequence[SampledRow]], torch.Tensor]
"""The model's logits `[C, V]` to those that vLLM samples from, float32, without gradient."""


def logits_processor(vllm_config: Any) -> Processor:
    """The code by which the engine's sampler applies sampling parameters.

    Model runner V2 has kernels of its own, which round otherwise. `processed_logits` can go with
    the runner that it belongs to, which 0.32 still has.
    """
    if samples_in_float32(vllm_config):
        return partial(_processed_by_v2, vllm_config)
    return processed_logits


def _processed_by_v2(
    vllm_config: Any, logits: torch.Tensor, rows: Sequence[SampledRow]
) -> torch.Tensor:
    """`processed_logits` by model runner V2: every row is a request of its own.

    Relies on `RequestState`, `Sampler` and its `apply_sampling_params` as they are in 0.31 and
    0.32.
    """
    from vllm.v1.worker.gpu.sample.sampler import Sampler
    from vllm.v1.worker.gpu.states import RequestState

    (count, vocab_size), device = logits.shape, logits.device
    lengths = torch.tensor([len(row.prompt) + len(row.before) for row in rows])
    longest = int(lengths.max())
    requests = RequestState(count, longest, longest, 0, vocab_size, device)
    sampler = Sampler(vllm_config, count, vocab_size, device, requests)
    slots = torch.tensor([_add_row(requests, sampler, row) for row in rows], dtype=torch.int32)
    requests.apply_staged_writes()
    sampler.apply_staged_writes()
    on_device, no_drafts = slots.to(device), torch.zeros_like(slots, device=device)
    positions = (lengths - 1).to(device)
    out: torch.Tensor = sampler.apply_sampling_params(
        logits.detach(),
        on_device,
        on_device,
        slots.numpy(),
        positions,
        no_drafts,
        no_drafts,
        lengths.numpy(),
    )
    if device.type != "cpu":
        # The kernels read the requests from host memory, which goes with them.
        torch.accelerator.current_stream(device).synchronize()
    return out.float()


def _add_row(requests: Any, sampler: Any, row: SampledRow) -> int:
    """A request that is about to sample the row's token; its slot."""
    name = str(requests.num_reqs)
    requests.add_request(name, len(row.prompt), [*row.prompt, *row.before], 0, 1)
    slot: int = requests.req_id_to_index[name]
    sampler.add_request(slot, row.params)
    return slot


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
