"""A live engine in this process: its steps, cache and requests (vLLM internals, as `_vllm.py`).

Tested with vLLM 0.32 by `tests/contract`.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from torch import nn

from vllm_graft.weights.errors import WeightError

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


def engine_with_workers(checkpoint: str, **options: Any) -> Any:
    """A `vllm.LLM` whose ranks are processes."""
    from vllm import LLM

    return LLM(checkpoint, **options)


def adapter_of(core: Any) -> Any:
    """The model that the engine core's one worker runs."""
    adapter: nn.Module = core.model_executor.driver_worker.worker.model_runner.model
    return adapter


def core_of(llm_engine: Any) -> Any:
    """The `EngineCore` behind an in-process `LLMEngine`."""
    return llm_engine.engine_core.engine_core


def before_each_step(core: Any, ready: Callable[[bool], bool]) -> None:
    """Ask `ready(idle)` before every step of the engine; the step is left out if it says no.

    Relies on `EngineCore.step_fn`, which every client calls, and on
    `scheduler.running`. Can go when vLLM has a hook there.

    Args:
        ready: `idle` says that no request has begun; what it raises reaches the caller.
    """
    step = core.step_fn

    def checked() -> Any:
        if core.scheduler.has_requests() and not ready(not core.scheduler.running):
            return {}, False
        return step()

    core.step_fn = checked


def free_graphs_at_end(core: Any) -> None:
    """Free the CUDA graphs of compiled pieces before the engine shuts down, and before Python does.

    They hold operations of NCCL, and with them alive the shutdown of an engine on several ranks
    does not return. Relies on `CUDAGraphWrapper`, up to 0.32; can go when that shutdown frees them.
    """
    shutdown, runner = core.shutdown, core.model_executor.driver_worker.worker.model_runner
    free = functools.partial(_free_graphs, runner.vllm_config)

    def whole() -> None:
        free()
        shutdown()

    core.shutdown = whole
    atexit.register(free)


def _free_graphs(vllm_config: Any) -> None:
    from vllm.compilation.cuda_graph import CUDAGraphWrapper

    for wrapper in list(CUDAGraphWrapper._all_instances):
        if wrapper.vllm_config is vllm_config:
            wrapper.clear_graphs()


def forget_cached(core: Any) -> None:
    """Drop all cached keys and values; running requests compute theirs anew."""
    core.reset_prefix_cache(reset_running_requests=True)


def chunks_prompts(core: Any) -> bool:
    """Whether prompts may come in chunks; vLLM turns it off for MLA on most CPUs."""
    return bool(core.scheduler.scheduler_config.enable_chunked_prefill)


def caches_prefixes(core: Any) -> bool:
    """Whether there is a prefix cache; vLLM turns it off for MLA on most CPUs."""
    return bool(core.scheduler.cache_config.enable_prefix_caching)


@contextmanager
def token_budget(core: Any, tokens: int) -> Iterator[None]:
    """Schedule at most so many tokens per step in the block: longer prompts come in chunks.

    Raises:
        ValueError: the engine has no chunked prefill, so they would wait for ever.
    """
    if not chunks_prompts(core):
        raise ValueError(f"a budget of {tokens} tokens per step needs chunked prefill")
    scheduler = core.scheduler
    before, scheduler.max_num_scheduled_tokens = scheduler.max_num_scheduled_tokens, tokens
    try:
        yield
    finally:
        scheduler.max_num_scheduled_tokens = before


def abort_all(llm_engine: Any) -> None:
    """End every unfinished request without an output."""
    llm_engine.abort_request(list(llm_engine.output_processor.request_states), internal=True)


def refuse_requests(llm_engine: Any, reason: str) -> None:
    """Raise a `WeightError` for every new request, before it reaches the engine core.

    An error in the forward pass would end an engine core that is a process.
    """

    def add_request(*_: Any, **__: Any) -> None:
        raise WeightError(f"the engine refuses to serve: {reason}")

    llm_engine.add_request = add_request


def accept_requests(llm_engine: Any) -> None:
    """Take back `refuse_requests`."""
    vars(llm_engine).pop("add_request", None)


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


def raise_on_every_rank(failure: Exception | None) -> None:
    """Raise what failed on any tensor-parallel rank; every rank must call this.

    Raises:
        WeightError: of several ranks, with the reason of each that failed.
    """
    import torch.distributed as dist
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    reasons: list[str | None] = [None] * group.world_size
    if group.world_size > 1:
        mine = None if failure is None else str(failure)
        dist.all_gather_object(reasons, mine, group=group.cpu_group)
    elif failure is not None:
        raise failure
    failed = [f"rank {rank}: {why}" for rank, why in enumerate(reasons) if why is not None]
    if failed:
        raise WeightError("\n".join(failed)) from failure


def fail_all(llm_engine: Any, core: Any, error: Exception) -> None:
    """Let every unfinished request of an `AsyncLLM` raise `error`; the engine goes on."""
    states = llm_engine.output_processor
    requests = list(states.request_states)
    states.propagate_error(error)
    core.abort_requests(requests)


@contextmanager
def async_in_this_process() -> Iterator[None]:
    """An `AsyncLLM` built in the block has its engine core in this process.

    Relies on `EngineCoreClient.make_async_mp_client`. Can go when vLLM runs
    `AsyncLLM` without multiprocessing (it raises NotImplementedError up to 0.32).
    """
    from vllm.v1.engine.core_client import EngineCoreClient

    stock = EngineCoreClient.make_async_mp_client

    def make(vllm_config: Any, executor_class: Any, log_stats: bool, **_: Any) -> Any:
        return _async_client()(vllm_config, executor_class, log_stats)

    EngineCoreClient.make_async_mp_client = staticmethod(make)
    try:
        yield
    finally:
        EngineCoreClient.make_async_mp_client = stock


@functools.cache
def _async_client() -> Any:
    from vllm.v1.engine.core_client import EngineCoreClient, InprocClient

    class InprocAsyncClient(InprocClient):  # type: ignore[misc]
        """Steps the engine in the event loop's own thread, between other tasks.

        So weights that a task changes never change in the middle of a step.
        """

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.resources = SimpleNamespace(engine_dead=False)
            self.engine_ranks_managed = [0]
            self._work = asyncio.Event()

        def add_request(self, request: Any) -> None:
            super().add_request(request)
            self._work.set()

        async def get_output_async(self) -> Any:
            while not self.engine_core.scheduler.has_requests():
                self._work.clear()
                await self._work.wait()
            await asyncio.sleep(0)
            return self.get_output()

        def shutdown(self, timeout: float | None = None) -> None:
            self.resources.engine_dead = True
            super().shutdown(timeout)

    for name in vars(EngineCoreClient):
        if name.endswith("_async") and name != "get_output_async":
            setattr(InprocAsyncClient, name, _awaitable(name.removesuffix("_async")))
    return InprocAsyncClient


def _awaitable(name: str) -> Any:
    async def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Not every client method has a synchronous twin; the core has them all.
        owner = self if hasattr(type(self), name) else self.engine_core
        return getattr(owner, name)(*args, **kwargs)

    return call
