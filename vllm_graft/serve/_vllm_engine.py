"""A live engine in this process: its steps, cache and requests (vLLM internals, as `_vllm.py`).

Tested with vLLM 0.32 by `tests/contract`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_MULTIPROCESSING = "VLLM_ENABLE_V1_MULTIPROCESSING"


@contextmanager
def in_this_process() -> Iterator[None]:
    """Engines started in the block run in this process."""
    from vllm import envs

    before = os.environ.get(_MULTIPROCESSING)
    os.environ[_MULTIPROCESSING] = "0"
    # An engine that already ran here has frozen vLLM's view of the environment.
    envs.disable_envs_cache()
    try:
        yield
    finally:
        if before is None:
            del os.environ[_MULTIPROCESSING]
        else:
            os.environ[_MULTIPROCESSING] = before


def adapter_of(core: Any) -> Any:
    """The model that the engine core's one worker runs."""
    adapter: nn.Module = core.model_executor.driver_worker.worker.model_runner.model
    return adapter


def core_of(llm_engine: Any) -> Any:
    """The `EngineCore` behind an in-process `LLMEngine`."""
    return llm_engine.engine_core.engine_core


def before_each_step(core: Any, check: Callable[[bool], None]) -> None:
    """Call `check(idle)` before every step of the engine.

    Relies on `EngineCore.step_fn`, which every client calls, and on
    `scheduler.running`. Can go when vLLM has a hook there.

    Args:
        check: `idle` says that no request has begun; what it raises reaches the caller.
    """
    step = core.step_fn

    def checked() -> Any:
        if core.scheduler.has_requests():
            check(not core.scheduler.running)
        return step()

    core.step_fn = checked


def forget_cached(core: Any) -> None:
    """Drop all cached keys and values; running requests compute theirs anew."""
    core.reset_prefix_cache(reset_running_requests=True)


@contextmanager
def token_budget(core: Any, tokens: int) -> Iterator[None]:
    """Schedule at most so many tokens per step in the block: longer prompts come in chunks."""
    scheduler = core.scheduler
    before, scheduler.max_num_scheduled_tokens = scheduler.max_num_scheduled_tokens, tokens
    try:
        yield
    finally:
        scheduler.max_num_scheduled_tokens = before


def abort_all(llm_engine: Any) -> None:
    """End every unfinished request without an output."""
    llm_engine.abort_request(list(llm_engine.output_processor.request_states), internal=True)


def any_rank(fact: bool) -> bool:
    """Whether `fact` holds on any tensor-parallel rank; every rank must call this."""
    import torch
    import torch.distributed as dist
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    if group.world_size == 1:
        return fact
    flag = torch.tensor(int(fact))
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group.cpu_group)
    return bool(flag)
