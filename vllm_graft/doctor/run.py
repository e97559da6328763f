"""A checkpoint's port examined against its reference, from start to end. Torch only."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vllm_graft.doctor.compare import Agreement, agreement, divergences
from vllm_graft.doctor.diagnose import Diagnosis, diagnose
from vllm_graft.doctor.engine import Rows, absent_paths, options, paths, prefill
from vllm_graft.doctor.gradients import gradients
from vllm_graft.doctor.references import reference_of
from vllm_graft.doctor.report import Report
from vllm_graft.doctor.sides import (
    Adapted,
    ModuleReference,
    Prompts,
    Trace,
    scale_parameters,
    trace,
)
from vllm_graft.serve import _vllm, _vllm_engine
from vllm_graft.weights.save import save_checkpoint

_LENGTHS = (5, 40, 150)
"""The last one is longer than a KV block, so that the prefix cache has something."""
_UPDATE = 1.01
"""Factor on every parameter of both models."""
Run = tuple[str, Sequence[Rows]]
"""A path, and what the port said on it."""
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
        reference: "transformers"; "original", what the factory returns, untouched; or "vllm",
            stock vLLM's own implementation, which has no layers or gradients to compare.
        compiled: compare an engine with torch.compile too.
        tensor_parallel_size: if above 1, compare an engine with so many ranks too.

    Raises:
        ValueError: there is no such reference for this checkpoint; names what there may be.
    """
    examination = _Examination(checkpoint, arch, progress, reference)
    if compiled:
        examination.compiled()
    if tensor_parallel_size > 1:
        examination.parallel(tensor_parallel_size)
    return examination.report()


class _Examination:
    """Runs the port first and compares after.

    So a reference may be an engine too, and yet there is never more than one at a time.
    """

    def __init__(self, checkpoint: str, arch: str, progress: Progress, reference: str) -> None:
        from transformers import AutoConfig

        self.start = time.perf_counter()
        self.checkpoint, self.arch, self.progress = checkpoint, arch, progress
        progress("loading the reference")
        self.config = AutoConfig.from_pretrained(checkpoint)
        self.longest = min(256, getattr(self.config, "max_position_embeddings", None) or 256)
        self.reference = reference_of(reference, checkpoint, arch, self.longest)
        self.prompts = _prompts(self.config.vocab_size, self.longest)
        self.more: list[Run] = []

    def compiled(self) -> None:
        """Before `report`, which compares."""
        with self._engine(self.checkpoint, enforce_eager=False) as llm:
            self.more.append(self._prefilled("torch.compile", llm))

    def parallel(self, ranks: int) -> None:
        """Before `report`, which compares."""
        self.progress(f"starting {ranks} ranks")
        llm = _vllm_engine.engine_with_workers(
            self.checkpoint, tensor_parallel_size=ranks,
            hf_overrides={"architectures": [self.arch]}, **options(self.longest),
        )  # fmt: skip
        try:
            self.more.append(self._prefilled(f"TP={ranks}", llm))
        finally:
            llm.llm_engine.engine_core.shutdown()

    def report(self) -> Report:
        """All else, and what ran before."""
        with tempfile.TemporaryDirectory() as folder:
            exported = Path(folder) / "exported"
            with self._engine(self.checkpoint) as llm:
                before, inside = self._as_loaded(llm)
                left_out = list(absent_paths(llm))
                scale_parameters(llm.model, _UPDATE)
                after = [self._prefilled("after a weight update", llm)]
                self.progress("exporting")
                save_checkpoint(llm.model, self.checkpoint, exported)
            with self._engine(str(exported)) as llm:
                after.append(self._prefilled("after export and reload", llm))
            found = self._compared([*before, *self.more])
            self.reference.update(_UPDATE, exported)
            found += self._compared(after)
        return Report(
            paths=tuple(found),
            **inside,
            reference=self.reference.kind,
            seconds=time.perf_counter() - self.start,
            left_out=(*left_out, *self.reference.left_out()),
        )

    @contextmanager
    def _engine(self, checkpoint: str, **more: Any) -> Iterator[Any]:
        from vllm_graft.train.llm import TrainableLLM

        self.progress("starting the engine")
        llm = TrainableLLM(
            checkpoint, arch=self.arch, exact=_vllm.platform_device() == "cpu",
            **{**options(self.longest), **more},
        )  # fmt: skip
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()

    def _prefilled(self, path: str, llm: Any) -> Run:
        self.progress(path)
        return path, prefill(llm, self.prompts)

    def _as_loaded(self, llm: Any) -> tuple[list[Run], dict[str, Any]]:
        """Everything that needs the weights as they were loaded: paths, and the report's rest."""
        self.progress("training forward")
        core = _vllm_engine.core_of(llm.llm_engine)
        adapted = Adapted(llm.model, _vllm_engine.adapter_of(core).training_hidden)
        got = trace(adapted, self.prompts)
        ran: list[Run] = [("training forward", self._by_prompt(got.logprobs))]
        for path, rows in paths(llm, self.prompts):
            self.progress(path)
            ran.append((path, rows))
        return ran, self._inside(adapted, got)

    def _by_prompt(self, logprobs: torch.Tensor) -> list[Rows]:
        parts = logprobs.split([len(prompt) for prompt in self.prompts])
        return [Rows(list(p), 0, part, 0) for p, part in zip(self.prompts, parts, strict=True)]

    def _inside(self, adapted: Adapted, got: Trace) -> dict[str, Any]:
        """Layers, gradients and likely faults, if the reference has modules to compare with."""
        if not isinstance(self.reference, ModuleReference):
            return {"spots": (), "gradients": (), "diagnoses": ()}
        want = trace(self.reference, self.prompts)
        self.progress("gradients")
        slopes = gradients(adapted, self.reference, self.prompts)
        named: list[Diagnosis] = []
        if not agreement("training forward", got.logprobs, want.logprobs).healthy:
            short = self.prompts[:2]
            named = diagnose(adapted, self.reference, short, self.config, self.progress)
        spots = tuple(divergences(got, want))
        return {"spots": spots, "gradients": tuple(slopes), "diagnoses": tuple(named)}

    def _compared(self, ran: Sequence[Run]) -> list[Agreement]:
        """The port's log-probs against the reference's, which sees each token list once."""
        self.progress("comparing with the reference")
        needed = dict.fromkeys(_context(each) for _, rows in ran for each in rows)
        want = dict(zip(needed, self.reference.logprobs(needed), strict=True))
        return [
            agreement(
                path,
                torch.cat([each.logprobs for each in rows]),
                torch.cat([want[_context(each)][each.start :] for each in rows]),
            )
            for path, rows in ran
        ]


def _context(rows: Rows) -> tuple[int, ...]:
    """The tokens that the rows depend on: the last one sampled is not among them."""
    return tuple(rows.tokens[: rows.start + len(rows.logprobs)])


def _prompts(vocab_size: int, longest: int) -> Prompts:
    generator = torch.Generator().manual_seed(1)
    lengths = [min(n, longest - 16) for n in _LENGTHS]
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]
