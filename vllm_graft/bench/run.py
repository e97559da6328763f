"""The measurement: contenders start one after another, then take turns round by round."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from vllm_graft.bench.process import Worker, WorkerError
from vllm_graft.bench.spec import GRAFT, PEERS, VARIANTS, Contender, Measured, Round, Workload
from vllm_graft.serve.registry import ENV as REGISTRATIONS

_SETTLE_S = 0.5
"""Pause before a round, in which the previous contender's threads go to sleep."""

_TRIES = 3
"""How often a round is measured at most."""

Tell = Callable[[str, int], None]
"""Called with what is being done and how many steps are finished."""


def contenders(
    *,
    arch: str,
    peers: Iterable[str],
    llm: Mapping[str, Any],
    user_env: Mapping[str, str],
    cache: Path,
) -> list[Contender]:
    """Graft first, then the others; stock peers know nothing of Graft's models.

    Args:
        arch: a registered architecture.
        peers: keys of `PEERS` and `VARIANTS`.
        llm: arguments of `vllm.LLM` that all share.
        user_env: the environment before anything was registered.
        cache: folder for compile caches; each contender gets an empty one.
    """
    graft_env = {**child_env(user_env, cache / GRAFT), REGISTRATIONS: os.environ[REGISTRATIONS]}
    graft_llm = {**llm, "hf_overrides": {"architectures": [arch]}}
    result = [Contender(name=GRAFT, llm={**graft_llm, **VARIANTS[GRAFT]}, env=graft_env)]
    for name in peers:
        env = child_env(user_env, cache / name)
        if name in VARIANTS:
            env[REGISTRATIONS] = os.environ[REGISTRATIONS]
            result.append(Contender(name=name, llm={**graft_llm, **VARIANTS[name]}, env=env))
        else:
            result.append(Contender(name=name, llm={**llm, **PEERS[name]}, env=env))
    return result


def child_env(user_env: Mapping[str, str], cache: Path) -> dict[str, str]:
    """The environment of a contender whose compile caches are in `cache`."""
    defaults = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    forced = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
    }
    env = {**defaults, **user_env, **forced}
    env.pop(REGISTRATIONS, None)
    return env


def steps(num_contenders: int, workloads: list[Workload]) -> int:
    """How many steps `measure` tells of."""
    return num_contenders * (2 + sum(workload.rounds + 1 for workload in workloads))


def measure(
    entrants: list[Contender], workloads: list[Workload], logs: Path, tell: Tell
) -> list[Measured]:
    """Start every contender and measure in turn (A B C A B C ...), one workload after another.

    Args:
        entrants: who takes part; all engines stay alive until the end.
        workloads: of the rounds, one for each batch size.
        logs: folder for one log file per contender.
        tell: told of progress.

    Raises:
        WorkerError: a contender failed; names it and its log.
    """
    with ExitStack() as stack:
        pairs = [_started(entrant, logs, stack, tell) for entrant in entrants]
        for workload in workloads:
            _take_turns(pairs, workload, logs, tell)
        for worker, result in pairs:
            result.rss_gib, result.peak_rss_gib = worker.memory()
            if worker.contender.name in VARIANTS:
                result.python_us = worker.python_us(workloads[0])
    return [result for _, result in pairs]


def _take_turns(
    pairs: list[tuple[Worker, Measured]], workload: Workload, logs: Path, tell: Tell
) -> None:
    batch = f"batch {workload.batch_size}"
    for number in range(workload.rounds + 1):
        for worker, result in pairs:
            time.sleep(_SETTLE_S)
            with naming(worker.contender, logs):
                measured = usable_round(worker, workload, seed=number)
            if number:
                result.rounds.setdefault(workload.batch_size, []).append(measured)
            what = f"round {number} of {workload.rounds}" if number else "warming up"
            tell(f"{batch}, {what}: {worker.contender.name}", 1)


def _started(
    entrant: Contender, logs: Path, stack: ExitStack, tell: Tell
) -> tuple[Worker, Measured]:
    """Start a contender with empty caches, and again with full ones; the second stays."""
    log = logs / f"{entrant.name}.log"
    with naming(entrant, logs):
        tell(f"{entrant.name}: first start, caches empty", 0)
        with Worker(entrant, log) as first:
            cold_s, _ = first.start()
        tell(f"{entrant.name}: second start", 1)
        worker = stack.enter_context(Worker(entrant, log))
        warm_s, engine_s = worker.start()
    tell(f"{entrant.name}: ready", 1)
    return worker, Measured(
        contender=entrant, cold_startup_s=cold_s, startup_s=warm_s, engine_s=engine_s
    )


def usable_round(worker: Worker, workload: Workload, seed: int) -> Round:
    """One usable round: the run to the last token took longer than the one to the first.

    Raises:
        WorkerError: no usable round in `_TRIES`.
    """
    for _ in range(_TRIES):
        measured = worker.round(workload, seed)
        if measured.total_s > measured.prefill_s:
            return measured
    raise WorkerError(
        f"the machine is too busy: {_TRIES} times, {workload.output_len} tokens took less time "
        "than 1; use a quiet machine or a longer --output-len"
    )


@contextmanager
def naming(contender: Contender, logs: Path) -> Iterator[None]:
    """Add the contender and its log file to a `WorkerError`."""
    try:
        yield
    except WorkerError as error:
        raise WorkerError(
            f"{contender.name}: {error} (log: {logs / contender.name}.log)"
        ) from error


def read_once(checkpoint: Path) -> None:
    """Read weight files once, so that no contender pays for the first disk access."""
    for path in sorted(checkpoint.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
