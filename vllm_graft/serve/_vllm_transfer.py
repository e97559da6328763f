"""vLLM's weight-update hooks over memory that both sides see (vLLM internals, as `_vllm.py`).

Tested with vLLM 0.32 by `tests/contract`.
"""

from __future__ import annotations

import functools
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from vllm_graft.serve.receiving import Receiver, tensors_in
from vllm_graft.train.targets import BACKEND, METHOD
from vllm_graft.weights.errors import WeightError


def prepare_worker(gpu_worker: ModuleType) -> None:
    """Register the transport and give vLLM's workers the method that a push calls. Idempotent.

    Relies on `WeightTransferEngineFactory` and on `Worker`, the base of all workers up to
    0.32, whose methods `collective_rpc` calls by name.
    """
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    if hasattr(gpu_worker.Worker, METHOD):
        return
    WeightTransferEngineFactory.register_engine(BACKEND, engine_class())

    def graft_push(self: Any, step: str, info: dict[str, Any]) -> dict[str, Any]:
        if not hasattr(self, "graft_receiver"):
            self.graft_receiver = Receiver(WorkerHooks(self))
        answer: dict[str, Any] = self.graft_receiver.answer(step, info)
        return answer

    setattr(gpu_worker.Worker, METHOD, graft_push)


class WorkerHooks:
    """A worker's weight-update session."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker

    @property
    def takes_weights(self) -> bool:
        """Whether the engine was started with Graft's transport."""
        config = self._worker.vllm_config.weight_transfer_config
        return config is not None and config.backend == BACKEND

    @property
    def model(self) -> Any:
        """What the worker serves."""
        return self._worker.get_model()

    def start(self) -> None:
        """Begin an update: the layers take new tensors from now on."""
        self._worker.start_weight_update()

    @property
    def ranks(self) -> int:
        """Workers of the engine."""
        ranks: int = self._worker.parallel_config.world_size
        return ranks

    def write(self, segment: Any, tensors: list[Any]) -> None:
        """Load tensors of a segment."""
        self._worker.update_weights({"segment": segment, "tensors": tensors})

    def finish(self) -> None:
        """End an update; raises where it was not whole."""
        self._worker.finish_weight_update()

    def abandon(self) -> None:
        """End an update that is not whole, so that another one can begin.

        Relies on `_weight_update_active`, with which a worker refuses a second update
        for good. Can go when vLLM can call an update off.
        """
        from vllm.config import set_current_vllm_config

        engine = self._worker.weight_transfer_engine
        # What is missing is why it is abandoned.
        with set_current_vllm_config(self._worker.vllm_config), suppress(WeightError):
            engine.finish_weight_update()
        self._worker._weight_update_active = False


@functools.cache
def engine_class() -> Any:
    """The `WeightTransferEngine` of vLLM over shared memory."""
    from vllm.distributed.weight_transfer import base

    @dataclass
    class Init(base.WeightTransferInitInfo):  # type: ignore[misc]
        pass

    @dataclass
    class Update(base.WeightTransferUpdateInfo):  # type: ignore[misc]
        segment: Any
        tensors: list[Any]

    class SharedMemoryEngine(_Engine, base.WeightTransferEngine):  # type: ignore[misc]
        init_info_cls = Init
        update_info_cls = Update

    return SharedMemoryEngine


class _Engine:
    """What the transport does in a worker; the two sides need not meet beforehand."""

    model: Any
    model_config: Any
    vllm_config: Any

    def init_transfer_engine(self, init_info: Any) -> None:
        pass

    def shutdown(self) -> None:
        pass

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        with _plain_tensors():
            initialize_layerwise_reload(self.model)

    def receive_weights(self, update: Any) -> None:
        with _plain_tensors():
            self.model.load_weights(
                tensors_in(update.segment, self.vllm_config.parallel_config.rank, update.tensors)
            )

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        with _plain_tensors():
            finalize_layerwise_reload(self.model, self.model_config)


def _plain_tensors() -> Any:
    """Tensors made in the block are no inference tensors, which training could not save."""
    return torch.inference_mode(False)
