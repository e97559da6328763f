"""Everything Graft uses of vLLM's internals, and nothing else.

The kernels of the training forward are beside it, in `_vllm_cpu.py` and
`_vllm_cuda.py`.

Tested with vLLM 0.31 and 0.32 by `tests/contract`. Each entry says what it
relies on and when it can go.
"""

from __future__ import annotations

import copy
import functools
import multiprocessing
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from vllm_graft.attention.kernels import AttentionSpec
from vllm_graft.serve._vllm_cpu import exact_backend

SPLIT_KV_ENV = "VLLM_CPU_ATTN_SPLIT_KV"


# --- registration -----------------------------------------------------------


def accept_factories(
    registry: ModuleType, register: Callable[[str, Any], None], forget: Callable[[str], None]
) -> None:
    """Let `ModelRegistry.register_model` take factories and `VLLMModelForCausalLM` classes.

    Relies on `_ModelRegistry.register_model(model_arch, model_cls)`, which
    refuses functions up to 0.32. Can go when vLLM accepts factories. Idempotent.

    Args:
        register: gets what is a factory.
        forget: gets the name of what is vLLM's own, before vLLM registers it.
    """
    stock = registry._ModelRegistry.register_model
    if hasattr(stock, "__wrapped__"):
        return

    @functools.wraps(stock)
    def register_model(self: Any, model_arch: str, model_cls: Any) -> None:
        if _is_factory(model_cls):
            register(model_arch, model_cls)
        else:
            forget(model_arch)
            stock(self, model_arch, model_cls)

    registry._ModelRegistry.register_model = register_model


def register_stock(registry: ModuleType, arch: str, model_class: type[nn.Module]) -> None:
    """Register a class by vLLM's own method."""
    registry._ModelRegistry.register_model.__wrapped__(registry.ModelRegistry, arch, model_class)


def _is_factory(model_cls: Any) -> bool:
    from vllm_graft.model import VLLMModelForCausalLM

    if isinstance(model_cls, type):
        return issubclass(model_cls, VLLMModelForCausalLM)
    return callable(model_cls)


def prepare_process() -> None:
    """Settings that a process with Graft models needs; made before vLLM reads them.

    With KV split on, the CPU attention kernel adds partial results in an order
    that depends on the batch, so log-probabilities would too. A value set by
    the user stays. The registration variable is declared to vLLM, which warns
    of `VLLM_` names it does not know.
    """
    from vllm import envs

    from vllm_graft.serve.registry import ENV

    envs.environment_variables.setdefault(ENV, lambda: os.environ.get(ENV))
    if SPLIT_KV_ENV not in os.environ:
        os.environ[SPLIT_KV_ENV] = "0"
        # An engine that already ran in this process has frozen vLLM's view of the environment.
        disable_cache = getattr(envs, "disable_envs_cache", None)
        if disable_cache is not None:
            disable_cache()


def guard_engine_start(executor: ModuleType, check: Callable[[list[str]], None]) -> None:
    """Call `check(architectures)` before an engine starts child processes.

    Relies on `Executor.get_class(vllm_config)`, which every engine calls in the
    parent up to 0.32. Can go when vLLM ships registrations to its children. Idempotent.
    """
    stock = executor.Executor.get_class
    if hasattr(stock, "__wrapped__"):
        return

    @functools.wraps(stock)
    def get_class(vllm_config: Any) -> Any:
        from vllm import envs

        chosen = stock(vllm_config)
        backend = vllm_config.parallel_config.distributed_executor_backend
        children = envs.VLLM_ENABLE_V1_MULTIPROCESSING or backend in ("mp", "ray")
        if children and vllm_config.model_config is not None:
            check(list(vllm_config.model_config.architectures))
        return chosen

    executor.Executor.get_class = staticmethod(get_class)


# --- model construction -----------------------------------------------------


def give_hf_config(vllm_config: Any) -> None:
    """Make `vllm_config.hf_config` work, as the Custom Model API promises.

    Up to 0.32 vLLM keeps it at `vllm_config.model_config.hf_config`. Can go when
    `VllmConfig` has the attribute. Idempotent.
    """
    cls = type(vllm_config)
    if not hasattr(cls, "hf_config"):
        cls.hf_config = property(lambda self: self.model_config.hf_config)


def refuse_hidden_experts(parallel_config: Any) -> None:
    """Raise if vLLM's loader would leave out the experts of other ranks.

    Relies on `ParallelConfig.enable_ep_weight_filter`. Can go when a load may leave out rows of
    other ranks.

    Raises:
        ValueError: it would.
    """
    if parallel_config.enable_expert_parallel and parallel_config.enable_ep_weight_filter:
        raise ValueError(
            "enable_ep_weight_filter=True hides the experts of other ranks, and every rank checks "
            "that the checkpoint has all; leave it out: a rank takes only its own out of the files"
        )


def refuse_latent_cache(vllm_config: Any) -> None:
    """Raise if vLLM plans a latent cache for a model whose attention has expanded keys.

    Relies on `ModelConfig.use_mla`, which goes by the model's type.

    Raises:
        ValueError: it does.
    """
    if vllm_config.model_config.use_mla:
        raise ValueError(
            "vLLM plans a latent cache for this type of model, but Transformers' attention "
            "expands keys and values; set the environment variable VLLM_MLA_DISABLE=1"
        )


def process_group(axis: str) -> Any:
    """The device group of vLLM for `"tp"` or `"pp"`, or None before it exists."""
    from vllm.distributed import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return None
    get = parallel_state.get_tp_group if axis == "tp" else parallel_state.get_pp_group
    return get().device_group


def platform_device() -> str:
    """`"cpu"`, `"cuda"`, ...: the device type of vLLM's platform."""
    from vllm.platforms import current_platform

    return str(current_platform.device_type)


def forward_running() -> Callable[[], bool]:
    """What says whether vLLM is inside a model forward (its forward context is set)."""
    from vllm.forward_context import is_forward_context_available

    asked: Callable[[], bool] = is_forward_context_available
    return asked


def paged_attention_layer(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    spec: AttentionSpec,
    has_sinks: bool,
    exact: bool,
    prefix: str,
    vllm_config: Any,
    on_weights_ready: Callable[[], None],
) -> nn.Module:
    """A vLLM `Attention` layer; building it registers its KV cache under `prefix`.

    vLLM calls an attention layer's `process_weights_after_loading` when the
    initial load, or a whole live update, is complete: `on_weights_ready` is told.
    """
    # Without a window of its own a layer takes the checkpoint's; the module knows better.
    cache_config = copy.copy(vllm_config.cache_config)
    cache_config.sliding_window = None
    # The choice of a backend depends on whether there are sinks; each forward brings them.
    sinks = {"sinks": torch.zeros(num_heads)} if has_sinks else {}
    layer: nn.Module = _layer_class()(
        num_heads=num_heads,
        head_size=head_size,
        scale=spec.scale,
        alibi_slopes=None if spec.alibi_slopes is None else list(spec.alibi_slopes),
        logits_soft_cap=spec.softcap,
        num_kv_heads=num_kv_heads,
        cache_config=cache_config,
        quant_config=vllm_config.quant_config,
        per_layer_sliding_window=spec.sliding_window,
        prefix=prefix,
        **sinks,
    )
    layer.on_weights_ready = on_weights_ready  # type: ignore[assignment]
    if exact and platform_device() == "cpu":
        layer.attn_backend = exact_backend()
    return layer


def set_sinks(layer: Any, sinks_N: torch.Tensor) -> None:
    """Give an attention layer its sinks as they are now: training may have moved them."""
    layer.impl.sinks = sinks_N.detach()


@functools.cache
def _layer_class() -> Any:
    from vllm.model_executor.layers.attention import Attention

    class GraftPagedAttention(Attention):  # type: ignore[misc]
        on_weights_ready: Callable[[], None]

        def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
            super().process_weights_after_loading(act_dtype)
            self.on_weights_ready()

    return GraftPagedAttention


EXACT_OPTION = "vllm_graft_exact"
"""Key in vLLM's `additional_config`, True by default."""
PACKING_OPTION = "vllm_graft_packing"
"""Another one: `"release"` or `"keep"` the weights once they are packed, or `"off"`."""


def serves_exactly(vllm_config: Any) -> bool:
    """Whether serving keeps to the training forward's arithmetic where that costs speed.

    On cards only in vLLM's batch-invariant mode: elsewhere products depend on their batch
    whatever else is done.

    Raises:
        ValueError: the option is no boolean (the string "false" is true).
    """
    chosen = _option(vllm_config, EXACT_OPTION, True)
    if not isinstance(chosen, bool):
        raise ValueError(f"additional_config: {EXACT_OPTION}={chosen!r}; use true or false")
    return chosen and can_be_exact()


def can_be_exact() -> bool:
    """Whether products here can give a row the same bits in every batch."""
    from vllm import envs

    return platform_device() == "cpu" or bool(envs.VLLM_BATCH_INVARIANT)


def packing(vllm_config: Any) -> str:
    """What becomes of weights that are packed: `"release"`, `"keep"`, or `"off"`.

    By default the processes that the engine started release them, since they only serve;
    where the engine runs in the user's own process the module is the user's.

    Raises:
        ValueError: the option is something else.
    """
    own = multiprocessing.parent_process() is None
    chosen = _option(vllm_config, PACKING_OPTION, "keep" if own else "release")
    if chosen not in ("release", "keep", "off"):
        raise ValueError(
            f'additional_config: {PACKING_OPTION}={chosen!r}; use "release", "keep" or "off"'
        )
    return str(chosen)


def _option(vllm_config: Any, name: str, default: Any) -> Any:
    extra = vllm_config.additional_config
    return extra.get(name, default) if isinstance(extra, dict) else default


def mla_kv_cache_spec(*, head_size: int, block_size: int, dtype: torch.dtype) -> Any:
    """`MLAAttentionSpec` with the one latent vector per token that MLA caches."""
    from vllm.v1.kv_cache_interface import MLAAttentionSpec

    return MLAAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=head_size, dtype=dtype)


def compiled(module_class: type[nn.Module]) -> type[nn.Module]:
    """`module_class` under vLLM's own `support_torch_compile`."""
    from vllm.compilation.decorators import support_torch_compile

    decorated: type[nn.Module] = support_torch_compile(
        dynamic_arg_dims={"input_ids": 0, "positions": 0, "hidden_states": 0}
    )(module_class)
    return decorated


def extend_compile_key(vllm_config: Any, **digests: str) -> None:
    """Make the compile cache key depend on the model itself.

    Up to 0.32 vLLM keys on its config and the traced files, so two factories that differ
    in one constant would share compiled code. `additional_config` is part of
    the key. Can go when vLLM hashes the module.
    """
    if isinstance(vllm_config.additional_config, dict):
        named = {f"vllm_graft_{what}": digest for what, digest in digests.items()}
        vllm_config.additional_config.update(named)


def runs_compiled(body: Any) -> bool:
    """Whether vLLM compiles the forward of `body`, so that a run of it has been traced.

    Relies on `do_not_compile`, which `support_torch_compile` sets, up to 0.32.
    """
    return not getattr(body, "do_not_compile", True)


def never_compile(body: Any) -> None:
    """Let a body under `support_torch_compile` run as it is from now on.

    Relies on `do_not_compile` being asked at every call, up to 0.32.
    """
    body.do_not_compile = True


def emulate_eager_rounding(vllm_config: Any) -> None:
    """Let compiled bf16 code round where eager code does.

    Inductor keeps fused intermediates in float32, and its pattern matcher adds biases and
    residuals to products before they are rounded, so compiled log-probabilities would differ
    from the training forward's. Values set by the user stay.
    """
    config = vllm_config.compilation_config.inductor_compile_config
    config.setdefault("emulate_precision_casts", True)
    config.setdefault("pattern_matcher", False)
