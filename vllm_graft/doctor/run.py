"""A checkpoint's port examined against its reference, from start to end. Torch only."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vllm_graft.doctor.compare import Agreement, agreement, divergences
from vllm_graft.doctor.diagnose import diagnose
from vllm_graft.doctor.engine import Rows, paths, prefill
from vllm_graft.doctor.gradients import gradients
from vllm_graft.doctor.references import original_reference, transformers_reference
from vllm_graft.doctor.report import Report
from vllm_graft.doctor.sides import Adapted, Prompts, trace
from vllm_graft.serve import _vllm, _vllm_engine
from vllm_graft.weights.save import save_checkpoint

_LENGTHS = (5, 40, 150)
"""The last one is longer than a KV block, so that the prefix cache has something."""
_UPDATE = 1.01
"""Factor on every parameter of both models: an update that needs no names."""
Progress = Callable[[str], None]


def doctor(
    checkpoint: str,
    arch: str,
    progress: Progress = print,
    *,
    reference: str = "transformers",
    compiled: bool = False,
    tensor_parallel_size: int = 1,
) -> Report:
    """Compare a port with the right model of the checkpoint, in float32.

    Args:
        checkpoint: folder in Hugging Face format.
        arch: registered architecture of the port.
        progress: told what is being done.
        reference: "transformers", or "original": what the factory returns, untouched.
        compiled: compare an engine with torch.compile too.
        tensor_parallel_size: if above 1, compare an engine with so many ranks too.
    """
    examination = _Examination(checkpoint, arch, progress, reference)
    if compiled:
        examination.compiled()
    if tensor_parallel_size > 1:
        examination.parallel(tensor_parallel_size)
    return examination.report()


class _Examination:
    def __init__(self, checkpoint: str, arch: str, progress: Progress, reference: str) -> None:
        from transformers import AutoConfig

        self.start = time.perf_counter()
        self.checkpoint, self.arch, self.progress = checkpoint, arch, progress
        progress("loading the reference")
        self.config = AutoConfig.from_pretrained(checkpoint)
        self.longest = min(256, getattr(self.config, "max_position_embeddings", None) or 256)
        if reference == "original":
            self.reference = original_reference(checkpoint, arch, self.longest)
        else:
            self.reference = transformers_reference(checkpoint)
        self.prompts = _prompts(self.config.vocab_size, self.longest)
        self.more: list[Agreement] = []

    def compiled(self) -> None:
        """Before `report`, which updates the reference."""
        with self._engine(self.checkpoint, enforce_eager=False) as llm:
            self.more.append(self._compared("torch.compile", prefill(llm, self.prompts)))

    def parallel(self, ranks: int) -> None:
        """Before `report`, which updates the reference."""
        self.progress(f"starting {ranks} ranks")
        llm = _vllm_engine.engine_with_workers(
            self.checkpoint, tensor_parallel_size=ranks,
            hf_overrides={"architectures": [self.arch]}, **_vllm_options(self.longest),
        )  # fmt: skip
        try:
            self.more.append(self._compared(f"TP={ranks}", prefill(llm, self.prompts)))
        finally:
            llm.llm_engine.engine_core.shutdown()

    def report(self) -> Report:
        """All else, and what was found before."""
        with tempfile.TemporaryDirectory() as folder:
            exported = Path(folder) / "exported"
            with self._engine(self.checkpoint) as llm:
                report = self._first(llm)
                found = [*report.paths, *self.more, self._updated(llm)]
                self.progress("exporting")
                save_checkpoint(llm.model, self.checkpoint, exported)
            with self._engine(str(exported)) as llm:
                found.append(self._compared("after export and reload", prefill(llm, self.prompts)))
        seconds = time.perf_counter() - self.start
        return replace(report, paths=tuple(found), seconds=seconds)

    @contextmanager
    def _engine(self, checkpoint: str, **options: Any) -> Iterator[Any]:
        from vllm_graft.train.llm import TrainableLLM

        self.progress("starting the engine")
        llm = TrainableLLM(
            checkpoint, arch=self.arch, exact=_vllm.platform_device() == "cpu",
            **{**_vllm_options(self.longest), **options},
        )  # fmt: skip
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()

    def _first(self, llm: Any) -> Report:
        """Everything that needs the weights as they were loaded."""
        self.progress("training forward")
        core = _vllm_engine.core_of(llm.llm_engine)
        adapted = Adapted(llm.model, _vllm_engine.adapter_of(core).training_hidden)
        want, got = trace(self.reference, self.prompts), trace(adapted, self.prompts)
        found = [agreement("training forward", got.logprobs, want.logprobs)]
        found += [self._compared(path, rows) for path, rows in paths(llm, self.prompts)]
        self.progress("gradients")
        slopes = gradients(adapted, self.reference, self.prompts)
        healthy = found[0].healthy
        short = self.prompts[:2]
        named = (
            () if healthy else diagnose(adapted, self.reference, short, self.config, self.progress)
        )
        return Report(
            paths=tuple(found),
            spots=tuple(divergences(got, want)),
            gradients=tuple(slopes),
            diagnoses=tuple(named),
            reference=self.reference.kind,
            seconds=0.0,
        )

    def _updated(self, llm: Any) -> Agreement:
        for model in (llm.model, self.reference.module):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(_UPDATE)
        return self._compared("after a weight update", prefill(llm, self.prompts))

    def _compared(self, path: str, rows: Sequence[Rows]) -> Agreement:
        """The engine's log-probs against the reference's on the same tokens."""
        self.progress(path)
        want = []
        for each in rows:
            with torch.no_grad():
                logprobs = self.reference.logits([each.tokens]).log_softmax(-1)
            want.append(logprobs[each.start : each.start + len(each.logprobs)])
        return agreement(path, torch.cat([each.logprobs for each in rows]), torch.cat(want))


def _vllm_options(longest: int) -> dict[str, Any]:
    return {
        "dtype": "float32", "enforce_eager": True, "max_model_len": longest, "max_logprobs": -1,
        "skip_tokenizer_init": True, "enable_prefix_caching": True,
    }  # fmt: skip


def _prompts(vocab_size: int, longest: int) -> Prompts:
    generator = torch.Generator().manual_seed(1)
    lengths = [min(n, longest - 16) for n in _LENGTHS]
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]
