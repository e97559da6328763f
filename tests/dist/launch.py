"""Starting ranks and engines with worker processes for the tests here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support import ROOT


def torchrun(ranks: int, module: str, *arguments: str) -> str:
    """Run `module` on `ranks` processes of this machine, one core each; what they printed."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", module, *arguments]
    binding = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(ranks)))}
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **binding}, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    # The first rank that failed comes before torchrun's own report.
    assert done.returncode == 0, done.stderr[done.stderr.find("Traceback") :][:8000]
    return done.stdout


class Workers(subprocess.CompletedProcess[str]):
    """What an engine with worker processes printed."""

    def tokens(self) -> list[list[int]]:
        """The tokens of each completion."""
        lines = [line for line in self.stdout.splitlines() if "TOKENS" in line]
        assert lines, self.stderr[-4000:]
        return json.loads(lines[0].split("TOKENS ")[1])


def with_workers(
    checkpoint: Path, arch: str, prompts: list[list[int]], options: dict[str, Any]
) -> Workers:
    """Serve `prompts` by `workers_script.py` with two worker processes, one core each."""
    arguments = [str(checkpoint), arch, json.dumps(prompts), json.dumps(options)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.dist.workers_script", *arguments], cwd=ROOT,
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    return Workers(done.args, done.returncode, done.stdout, done.stderr)
