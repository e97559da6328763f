"""Engine processes end with their parent; without Graft models they stay as vLLM made them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import psutil
import pytest

from tests.support import ROOT
from vllm_graft.serve.registry import ENV

PARENT = """
import multiprocessing, os, sys, time
from vllm_graft.serve.lifetime import end_with_parent

def child(pipe):
    end_with_parent()
    pipe.send(os.getpid())
    time.sleep(60)

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    receive, send = context.Pipe(duplex=False)
    children = [context.Process(target=child, args=(send,)) for _ in range(2)]
    for process in children:
        process.start()
    pids = [receive.recv() for _ in children]
    open(sys.argv[2], "w").write(repr(pids))
    os._exit(0)
"""


def orphans(tmp_path, method: str, models: dict[str, str], wait_s: float) -> int:
    """How many of two children are alive `wait_s` after their parent left without clean-up."""
    script, pids = tmp_path / "parent.py", tmp_path / "pids"
    script.write_text(PARENT)
    subprocess.run(
        [sys.executable, script, method, pids], check=True, timeout=60, stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT), ENV: json.dumps(models)},
    )  # fmt: skip
    children = [psutil.Process(p) for p in json.loads(pids.read_text()) if psutil.pid_exists(p)]
    _, alive = psutil.wait_procs(children, timeout=wait_s)
    for process in alive:
        process.kill()
    return len(alive)


# A forked child holds its older siblings' ends of the pipes that tell of the parent's death.
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_children_end_with_their_parent(method, tmp_path):
    assert orphans(tmp_path, method, {"Model": "library:build"}, wait_s=10) == 0


def test_children_of_engines_without_graft_models_are_left_alone(tmp_path):
    assert orphans(tmp_path, "spawn", {}, wait_s=1) == 2
