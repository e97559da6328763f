"""From the arguments of `TrainableLLM` to those of vLLM's engine. Torch only."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch import nn

from vllm_graft.serve._vllm import EXACT_OPTION, can_be_exact
from vllm_graft.serve.registry import register


def engine_options(
    factory: Callable[..., nn.Module] | str | None,
    arch: str | None,
    exact: bool,
    options: dict[str, Any],
) -> dict[str, Any]:
    """What `vllm.LLM` gets, with the architecture registered.

    Raises:
        ValueError: see `TrainableLLM`.
    """
    if factory is None and arch is None:
        raise ValueError(
            "TrainableLLM needs the model's factory (factory='module:attr' or a callable) or the "
            "name of a registered architecture (arch='...')"
        )
    _refuse(options)
    if exact and not can_be_exact():
        raise ValueError(
            "TrainableLLM with exact=True: on a card, products give a token the same bits in every "
            "batch only under VLLM_BATCH_INVARIANT=1; set it in the environment before Python "
            "starts, or pass exact=False"
        )
    if factory is not None:
        arch = arch or _name_for(factory)
        register(arch, factory)
    overrides = options.pop("hf_overrides", None) or {}
    if callable(overrides):
        raise ValueError("TrainableLLM: hf_overrides must be a dict")
    extra = dict(options.pop("additional_config", None) or {})
    _arrange_ranks(options)
    return {
        **options,
        "hf_overrides": {**overrides, "architectures": [arch]},
        "additional_config": {**extra, EXACT_OPTION: exact},
    }


_ANOTHER_FORM = (
    "the engine would hold the weights in another form than the trainer's; leave it out, or serve "
    "with vllm.LLM"
)
_REFUSED = {
    "quantization": _ANOTHER_FORM,
    "enable_lora": _ANOTHER_FORM,
    "enable_sleep_mode": (
        "a sleeping engine gives back the memory of its weights, which are the trainer's; leave it "
        "out, and size the KV cache by gpu_memory_utilization"
    ),
}
"""Options of `vllm.LLM`, and why a live module does not go with them."""


def _refuse(options: dict[str, Any]) -> None:
    for name, reason in _REFUSED.items():
        if options.get(name):
            raise ValueError(f"TrainableLLM with {name}={options[name]!r}: {reason}")


def _name_for(factory: Callable[..., nn.Module] | str) -> str:
    named = factory if isinstance(factory, str) else getattr(factory, "__qualname__", "factory")
    return "Graft_" + "".join(c if c.isalnum() else "_" for c in named)


def _arrange_ranks(options: dict[str, Any]) -> None:
    """Run tensor-parallel ranks where torchrun put them: each holds its live shard."""
    stages = options.get("pipeline_parallel_size", 1)
    if stages != 1:
        raise ValueError(
            f"TrainableLLM with pipeline_parallel_size={stages}: no backward runs from stage to "
            "stage; use tensor_parallel_size"
        )
    ranks = int(options.get("tensor_parallel_size", 1))
    if ranks == 1:
        return
    if int(os.environ.get("WORLD_SIZE", "1")) != ranks:
        raise ValueError(
            f"TrainableLLM with tensor_parallel_size={ranks} runs in {ranks} processes, one live "
            f"shard each: start the script with torchrun --nproc-per-node {ranks}"
        )
    options.setdefault("distributed_executor_backend", "external_launcher")
