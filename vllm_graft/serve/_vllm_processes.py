"""The processes of an engine and what they share (vLLM internals, as `_vllm.py`)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run_first(owner: type, entry: str, prepare: Callable[[], None]) -> None:
    """Call `prepare()` at the start of a child process that runs `owner.entry`.

    Relies on `EngineCoreProc.run_engine_core` and `WorkerProc.worker_main`, static methods
    that up to 0.32 are the targets of vLLM's processes. Can go when vLLM's engine core
    ends with its parent. Idempotent.
    """
    stock = getattr(owner, entry)
    if hasattr(stock, "__wrapped__"):
        return

    @functools.wraps(stock)
    def run(*args: Any, **kwargs: Any) -> Any:
        prepare()
        return stock(*args, **kwargs)

    setattr(owner, entry, staticmethod(run))


def unlink_when_shared(shared: Any) -> None:
    """Let nothing in /dev/shm outlive the ranks that share it, however they end.

    A killed rank leaves its memory there up to 0.32, 4 MiB of it, and under torchrun under a
    name that the next start would take ("create shm in SHMManager failed"). Once every rank has
    mapped it nobody needs the name. Relies on `_CPUSHMDistributed._init_cpu_shm` returning
    after that, and on `group_name`. Can go when vLLM unlinks by itself.

    Args:
        shared: vLLM's class `_CPUSHMDistributed`.
    """
    stock = shared._init_cpu_shm

    @functools.wraps(stock)
    def init(self: Any) -> int:
        handle: int = stock(self)
        name = f"{self.group_name}_{self.communicator.rank}".lstrip("/")
        Path("/dev/shm", name).unlink(missing_ok=True)  # noqa: S108 - shm_open's own folder
        return handle

    shared._init_cpu_shm = init
