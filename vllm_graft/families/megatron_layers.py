"""Megatron-core 0.16: its parallel layers and MLP, for any batch and without CUDA.

Megatron's layers multiply by `torch.matmul`, whose float32 rows depend on the batch on CPU,
and its collectives want a process group even where there is one rank only. Here they get
another forward on CPU; their class, parameters, names and sharding stay. On CUDA, and with
options that only CUDA has, Megatron's own forward runs.

Imports nothing of Megatron at module level. Legend: `[..., K]` inputs, `[..., M]` outputs of
this rank.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vllm_graft import exact
from vllm_graft.families import megatron_parallel
from vllm_graft.weights.shards import Shard, mark_shard

_LAYERS = "megatron.core.tensor_parallel.layers"
"""Looked up where it is loaded already: without it, no model has modules of it."""


def loaded() -> bool:
    """Whether Megatron's layers exist in this process."""
    return _LAYERS in sys.modules


def correct_layers(model: nn.Module) -> None:
    """Give Megatron's embeddings, linear layers and gated MLPs a forward for any batch.

    A token's result then depends on that token only. Subclasses that override what would
    be replaced are left alone.
    """
    for kind, forward in _corrected():
        for module in model.modules():
            own = "forward" in vars(module) or not isinstance(module, kind)
            if not own and type(module).forward is kind.forward:
                module.forward = partial(forward, module)
    for module in model.modules():
        if hasattr(module, "bias_dropout_add_exec_handler"):
            # Megatron turns gradients on around residual additions, in inference too.
            module.bias_dropout_add_exec_handler = nullcontext  # type: ignore[assignment]


def _corrected() -> Iterator[tuple[Any, Callable[..., Any]]]:
    layers = sys.modules[_LAYERS]
    yield layers.ColumnParallelLinear, _column
    yield layers.RowParallelLinear, _row
    yield layers.VocabParallelEmbedding, _embedding
    mlp = sys.modules.get("megatron.core.transformer.mlp")
    if mlp is not None:
        yield mlp.MLP, _mlp


def note_shares(model: nn.Module) -> None:
    """Note which parameters are shares of a whole, so that loading and export know.

    A second call changes nothing.
    """
    if model.__dict__.setdefault("_graft_shares_noted", False):
        return
    model.__dict__["_graft_shares_noted"] = True
    layers = sys.modules[_LAYERS]
    for module in model.modules():
        if isinstance(module, layers.ColumnParallelLinear):
            several = module.output_size_per_partition != module.output_size
            shares = {"weight": 0, "bias": 0} if several else {}
        elif isinstance(module, layers.RowParallelLinear):
            several = module.input_size_per_partition != module.input_size
            shares = {"weight": 1} if several else {}
        elif isinstance(module, layers.VocabParallelEmbedding):
            several = module.num_embeddings_per_partition != module.num_embeddings
            shares = {"weight": 0} if several else {}
        else:
            _add_up_norms(module)
            continue
        for name, dim in shares.items():
            parameter: Any = getattr(module, name, None)
            if parameter is not None:
                group: Any = module.tp_group
                mark_shard(parameter, Shard(dim, group.rank(), group))


def _add_up_norms(attention: Any) -> None:
    """Each rank's heads give a part of the gradient of the norms on queries and keys."""
    if getattr(attention, "world_size", 1) == 1 or not hasattr(attention, "linear_qkv"):
        return
    for norm in (attention.q_layernorm, attention.k_layernorm):
        for parameter in norm.parameters() if norm is not None else ():
            total = partial(megatron_parallel.sum_over, group=attention.tp_group)
            parameter.register_hook(total)


def _plain(module: Any, x: torch.Tensor) -> bool:
    """Whether a linear layer is a product and at most one collective."""
    return not (
        x.is_cuda
        or module.sequence_parallel
        or module.explicit_expert_comm
        or module.gradient_accumulation_fusion
        or getattr(module, "disable_grad_reduce", False)
        or module.config.defer_embedding_wgrad_compute
    )


def _column(
    module: Any,
    input_: torch.Tensor,
    weight: torch.Tensor | None = None,
    runtime_gather_output: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    weight = module.weight if weight is None else weight
    if not _plain(module, input_) or weight is None:
        found: tuple[torch.Tensor, torch.Tensor | None] = type(module).forward(
            module, input_, weight, runtime_gather_output
        )
        return found
    several = module.output_size_per_partition != module.output_size
    x = megatron_parallel.copy_to(input_, module.tp_group) if several else input_
    bias = None if module.skip_bias_add else module.bias
    own = weight is module.weight
    out = exact.product(module, x, bias) if own else exact.linear(x, weight, bias)
    gather = module.gather_output if runtime_gather_output is None else runtime_gather_output
    if gather and several:
        out = megatron_parallel.gather(out, module.tp_group)
    return out, module.bias if module.skip_bias_add else None


def _row(module: Any, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    if not _plain(module, input_) or not module.input_is_parallel:
        found: tuple[torch.Tensor, torch.Tensor | None] = type(module).forward(module, input_)
        return found
    several = module.input_size_per_partition != module.input_size
    out = exact.product(module, input_, None)
    if exact.compiled_serving():
        # A view: Megatron rewraps those by a write to `.data`, which does not compile.
        out = out.clone()
    if several:
        out = megatron_parallel.reduce(out, module.tp_group)
    if module.skip_bias_add or module.bias is None:
        return out, module.bias
    return out + module.bias, None


def _embedding(module: Any, input_: torch.Tensor) -> torch.Tensor:
    several = module.num_embeddings_per_partition != module.num_embeddings
    if several or input_.is_cuda:
        out: torch.Tensor = type(module).forward(module, input_)
        return out
    return F.embedding(input_, module.weight)


def _mlp(
    module: Any,
    hidden_states: torch.Tensor,
    per_token_scale: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if hidden_states.is_cuda or per_token_scale is not None or not _is_swiglu(module.config):
        found: tuple[torch.Tensor, torch.Tensor | None] = type(module).forward(
            module, hidden_states, per_token_scale, **kwargs
        )
        return found
    both, bias = module.linear_fc1(hidden_states)
    gate, up = (both if bias is None else both + bias).chunk(2, dim=-1)
    projected: tuple[torch.Tensor, torch.Tensor | None] = module.linear_fc2(exact.silu(gate) * up)
    return projected


def _is_swiglu(config: Any) -> bool:
    return bool(
        config.gated_linear_unit
        and config.activation_func is F.silu
        and config.activation_func_clamp_value is None
        and not config.glu_linear_offset
        and not config.use_te_activation_func
    )
