"""Engines with worker processes end as a whole, whichever of their processes dies."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.support import ROOT, qwen3_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.slow]

QWEN3 = "vllm_graft.examples.qwen3_torchtitan:build_qwen3_torchtitan"
START_S = 300
END_S = 30


@pytest.fixture(autouse=True)
def nothing_left_in_shared_memory() -> Iterator[None]:
    """Of what vLLM's CPU ranks share; other engines of this machine would count too."""
    before = set(Path("/dev/shm").glob("*cpushm*"))
    yield
    assert set(Path("/dev/shm").glob("*cpushm*")) <= before


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen3_checkpoint(tmp_path_factory.mktemp("lifetimes") / "checkpoint")


@contextmanager
def program(checkpoint: Path, log: Path, factory: str, ending: str) -> Iterator[psutil.Popen]:
    """`tests.dist.parent` in a session of its own, of which nothing is left at the end."""
    binding = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    with log.open("wb") as sink:
        parent = psutil.Popen(
            [sys.executable, "-m", "tests.dist.parent", factory, str(checkpoint), ending],
            cwd=ROOT, env={**os.environ, **binding}, stdin=subprocess.DEVNULL, stdout=sink,
            stderr=sink, start_new_session=True,
        )  # fmt: skip
    try:
        yield parent
    finally:
        with suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()


def started_by(parent: psutil.Popen) -> list[psutil.Process]:
    """Everyone in the parent's session, orphans too."""
    found = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError):
            mine = os.getsid(process.pid) == parent.pid != process.pid
            found += [process] if mine else []
    return found


def members(parent: psutil.Popen, title: str) -> list[psutil.Process]:
    """Those of them whose title holds `title`."""
    found = []
    for process in started_by(parent):
        with suppress(psutil.NoSuchProcess):
            found += [process] if title in " ".join(process.cmdline()) else []
    return found


def wait_until(what: Callable[[], bool], parent: psutil.Popen, log: Path) -> None:
    for _ in range(START_S * 10):
        if what():
            return
        with suppress(psutil.TimeoutExpired):
            parent.wait(0.1)
            break
    pytest.fail(log.read_text()[-4000:])


def serving(parent: psutil.Popen, log: Path) -> list[psutil.Process]:
    """Wait for tokens; everyone that the parent started."""
    wait_until(lambda: "READY" in log.read_text(), parent, log)
    assert len(members(parent, "VLLM::Worker")) == 2
    assert len(members(parent, "VLLM::EngineCore")) == 1
    return started_by(parent)


def assert_all_end(processes: list[psutil.Process]) -> None:
    """All are gone `END_S` from now; prints after how long (`pytest -rP` shows it)."""
    start = time.monotonic()
    _, alive = psutil.wait_procs(processes, timeout=END_S)
    print(f"MEASURED {len(processes)} processes ended after {time.monotonic() - start:.1f} s")
    assert alive == []


def test_a_killed_worker_ends_the_program_with_an_error(checkpoint, tmp_path):
    log = tmp_path / "log"
    with program(checkpoint, log, QWEN3, "never") as parent:
        everyone = serving(parent, log)
        members(parent, "VLLM::Worker_TP1")[0].kill()
        assert_all_end([parent, *everyone])
    assert parent.returncode == 1
    told = log.read_text()
    # Who notices first: vLLM's watch over its processes, or the rank that waits for the dead one.
    watched = "Worker proc VllmWorker-1 died unexpectedly (exit code: -9)" in told
    assert watched or re.search(r"Worker failed with error '.*Connection reset by peer", told)
    assert "EngineDeadError: EngineCore encountered an issue" in told


def test_a_killed_engine_core_leaves_no_workers(checkpoint, tmp_path):
    log = tmp_path / "log"
    with program(checkpoint, log, QWEN3, "never") as parent:
        serving(parent, log)
        workers = members(parent, "VLLM::Worker")
        members(parent, "VLLM::EngineCore")[0].kill()
        assert_all_end(workers)


def test_a_killed_parent_leaves_nobody(checkpoint, tmp_path):
    log = tmp_path / "log"
    with program(checkpoint, log, QWEN3, "never") as parent:
        everyone = serving(parent, log)
        parent.kill()
        assert_all_end(everyone)


def test_a_parent_that_exits_without_clean_up_leaves_nobody(checkpoint, tmp_path):
    log = tmp_path / "log"
    with program(checkpoint, log, QWEN3, "exit") as parent:
        everyone = serving(parent, log)
        assert parent.wait(END_S) == 3
        assert_all_end(everyone)


def test_a_parent_killed_while_its_workers_load_leaves_nobody(checkpoint, tmp_path):
    log = tmp_path / "log"
    with program(checkpoint, log, "tests.dist.bad_loads:for_minutes", "never") as parent:
        wait_until(lambda: log.read_text().count("BUILDING") == 2, parent, log)
        everyone = started_by(parent)
        assert len(everyone) == 4, "resource tracker, engine core, two workers"
        parent.kill()
        assert_all_end(everyone)


def test_a_rank_that_fails_to_load_names_itself_and_the_tensor(checkpoint, tmp_path):
    log = tmp_path / "log"
    factory = "tests.dist.bad_loads:without_lm_head_on_rank_1"
    with program(checkpoint, log, factory, "never") as parent:
        assert parent.wait(START_S) == 1
        assert_all_end(started_by(parent))
    told = log.read_text()
    assert re.search(r"\(Worker_TP1 .*WeightError.*\n?.*lm_head\.weight", told), told[-4000:]
    assert re.search(r"\(Worker_TP1 .*This was rank 1 of 2\.", told)
    assert "READY" not in told
