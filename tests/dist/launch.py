"""Starting ranks and engines with worker processes for the tests here."""

from __future__ import annotations

import os
import subprocess
import sys

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
