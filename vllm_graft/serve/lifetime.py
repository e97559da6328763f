"""Engine processes end with the process that started them, and leave nothing behind.

Stock vLLM up to 0.32 leaves its engine core, and with it the workers, alive when the parent is
killed: the core waits for requests that nobody will send. A worker that is still loading
notices the death of the core only when it has loaded. This module needs neither torch nor vLLM.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.process import BaseProcess
from types import ModuleType

from vllm_graft.serve.registry import registrations


def watch_core(core: ModuleType) -> None:
    """Called when vLLM's engine core module was just imported."""
    from vllm_graft.serve import _vllm_processes

    _vllm_processes.run_first(core.EngineCoreProc, "run_engine_core", end_with_parent)


def watch_workers(executor: ModuleType) -> None:
    """Called when vLLM's multiprocessing executor was just imported."""
    from vllm_graft.serve import _vllm_processes

    _vllm_processes.run_first(executor.WorkerProc, "worker_main", end_with_parent)


def watch_ranks(communicator: ModuleType) -> None:
    """Called when vLLM's communicator of CPU ranks was just imported."""
    from vllm_graft.serve import _vllm_processes

    if registrations():
        _vllm_processes.unlink_when_shared(communicator._CPUSHMDistributed)


def end_with_parent() -> None:
    """Let this engine process end as soon as its parent process has ended.

    Without Graft models the process stays as vLLM made it. The kernel's
    PR_SET_PDEATHSIG would not do: it fires when the thread that started the
    engine ends, and that may be long before the process does.
    """
    parent = multiprocessing.parent_process()
    if parent is not None and registrations():
        threading.Thread(
            target=_end_after, args=(parent,), daemon=True, name="GraftParentWatch"
        ).start()


def _end_after(parent: BaseProcess) -> None:
    parent.join()
    # A clean end would wait for peers and queues; nobody is left who could use it.
    os._exit(1)
