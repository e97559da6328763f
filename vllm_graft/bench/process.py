"""The parent's side of a contender: its process, commands and answers."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from vllm_graft.bench.spec import Contender, Round, Workload

_GRACE_S = 20


class WorkerError(RuntimeError):
    """A contender could not start or run; names its log file."""


class Worker:
    """One contender's engine in a process that lives until `close`.

    Args:
        contender: what to build.
        log: file for everything the process prints.
    """

    def __init__(self, contender: Contender, log: Path) -> None:
        self.contender = contender
        self.log = log
        self._begun = time.perf_counter()
        with log.open("wb") as sink:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vllm_graft.bench.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                env=contender.env,
                text=True,
                bufsize=1,
            )

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(kill=error is not None)

    def start(self) -> tuple[float, float]:
        """Build the engine.

        Returns:
            Seconds since the process was started, and the part in `vllm.LLM(...)`.

        Raises:
            WorkerError: it could not be built.
        """
        reply = self._ask(do="start", llm=self.contender.llm)
        return time.perf_counter() - self._begun, reply["engine_s"]

    def round(self, workload: Workload, seed: int) -> Round:
        """Measure one round of prompts drawn from `seed`."""
        reply = self._ask(
            do="round",
            seed=seed,
            batch_size=workload.batch_size,
            prompt_len=workload.prompt_len,
            output_len=workload.output_len,
        )
        return Round(
            prefill_s=reply["prefill_s"],
            total_s=reply["total_s"],
            first_tokens=tuple(reply["first_tokens"]),
            other_load=reply["other_load"],
        )

    def memory(self) -> tuple[float, float]:
        """Resident memory in GiB, now and at its highest."""
        reply = self._ask(do="memory")
        return reply["rss_gib"], reply["peak_rss_gib"]

    def python_us(self, workload: Workload) -> float:
        """Microseconds of a decode step in Graft's Python around the model; see `overhead`."""
        reply = self._ask(
            do="python", prompt_len=workload.prompt_len, output_len=workload.output_len
        )
        return float(reply["python_us"])

    def kernels(self, workload: Workload) -> list[tuple[str, float, float]]:
        """What ran on the card in a decode step: names, how many, microseconds."""
        reply = self._ask(
            do="kernels",
            batch_size=workload.batch_size,
            prompt_len=workload.prompt_len,
            output_len=workload.output_len,
        )
        return [tuple(kernel) for kernel in reply["kernels"]]

    def _ask(self, **command: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None  # noqa: S101
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"its process ended (status {self._process.wait()}); {self._last()}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply

    def _last(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"last words: {lines[-1]}" if lines else "it printed nothing"

    def close(self, *, kill: bool = False) -> None:
        """End the process: by closing its stdin, and by force if that takes too long."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        if kill:
            self._process.kill()
        try:
            self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
