"""A checkpoint's port examined against Transformers: the run and what it found. Torch only."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vllm_graft.doctor.compare import Agreement, Divergence, agreement, divergences, first
from vllm_graft.doctor.diagnose import Diagnosis, diagnose
from vllm_graft.doctor.engine import Rows, paths
from vllm_graft.doctor.gradients import Gradient, gradients
from vllm_graft.doctor.sides import Adapted, Prompts, Reference, trace
from vllm_graft.serve import _vllm_engine

_LENGTHS = (5, 40, 150)
"""The last one is longer than a KV block, so that the prefix cache has something."""


@dataclass(frozen=True)
class Report:
    """What the doctor found."""

    paths: tuple[Agreement, ...]
    spots: tuple[Divergence, ...]
    gradients: tuple[Gradient, ...]
    diagnoses: tuple[Diagnosis, ...]
    reference: str
    seconds: float

    @property
    def healthy(self) -> bool:
        """Whether every path and every gradient agrees with the reference."""
        paths = all(each.healthy for each in self.paths)
        return paths and all(each.healthy for each in self.gradients)

    @property
    def first(self) -> Divergence | None:
        """Where the port leaves the reference."""
        return first(list(self.spots))


def doctor(checkpoint: str, arch: str, progress: Callable[[str], None] = print) -> Report:
    """Compare a port with Transformers' model of the checkpoint, in float32.

    Args:
        checkpoint: folder in Hugging Face format.
        arch: registered architecture of the port.
        progress: told what is being done.
    """
    from transformers import AutoModelForCausalLM

    from vllm_graft.train.llm import TrainableLLM

    start = time.perf_counter()
    progress("loading the reference")
    original = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    longest = min(256, getattr(original.config, "max_position_embeddings", None) or 256)
    progress("starting the engine")
    llm = TrainableLLM(
        checkpoint, arch=arch, dtype="float32", enforce_eager=True, max_model_len=longest,
        max_logprobs=-1, skip_tokenizer_init=True, enable_prefix_caching=True,
    )  # fmt: skip
    reference = Reference(original, lambda t: original(t[None]).logits[0], "transformers")
    try:
        return _examine(llm, reference, original.config, start, progress)
    finally:
        llm.llm_engine.engine_core.shutdown()


def _examine(
    llm: Any, reference: Reference, config: Any, start: float, progress: Callable[[str], None]
) -> Report:
    prompts = _prompts(config.vocab_size, llm.model_config.max_model_len)
    progress("training forward")
    core = _vllm_engine.core_of(llm.llm_engine)
    adapted = Adapted(llm.model, _vllm_engine.adapter_of(core).training_hidden)
    want, got = trace(reference, prompts), trace(adapted, prompts)
    found = [agreement("training forward", got.logprobs, want.logprobs)]
    for path, rows in paths(llm, prompts):
        progress(path)
        found.append(agreement(path, *_both(rows, reference)))
    progress("gradients")
    slopes = gradients(adapted, reference, prompts)
    named = [] if found[0].healthy else diagnose(adapted, reference, prompts[:2], config, progress)
    return Report(
        paths=tuple(found),
        spots=tuple(divergences(got, want)),
        gradients=tuple(slopes),
        diagnoses=tuple(named),
        reference=reference.kind,
        seconds=time.perf_counter() - start,
    )


def _prompts(vocab_size: int, longest: int) -> Prompts:
    generator = torch.Generator().manual_seed(1)
    lengths = [min(n, longest - 16) for n in _LENGTHS]
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def _both(rows: list[Rows], reference: Reference) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of engine and reference, `[T, V]` each."""
    want = []
    for each in rows:
        with torch.no_grad():
            logprobs = reference.logits([each.tokens]).log_softmax(-1)
        want.append(logprobs[each.start : each.start + len(each.logprobs)])
    return torch.cat([each.logprobs for each in rows]), torch.cat(want)
