"""TorchTitan's own tensor parallelism on vLLM's ranks, with experts divided among them if asked.

The model's configs carry the sharding (`set_qwen3_sharding_config` and the
like, called before `build()`); `parallelize` applies it. TorchTitan 0.3's
default backend leaves plain local tensors as parameters and moves activations
by `spmd_types`, for which a mesh must be current while the model runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from vllm_graft.attention.shard import shard_attention
from vllm_graft.exact import make_exact
from vllm_graft.families.torchtitan_ep import check_expert_parallel, divide_experts
from vllm_graft.weights.shards import Shard, mark_shard
from vllm_graft.weights.slots import Slot, tensor_in, tied_names


class TitanParallel:
    """A model under tensor parallelism, or on one rank.

    Args:
        model: TorchTitan's, attention replaced, built from configs with sharding.
        parallel_context: vLLM's, from the factory; None for one rank.

    Raises:
        ValueError: heads or experts that the ranks cannot share, or processes beside the
            tensor-parallel ranks (pipeline stages, data-parallel replicas with experts).
    """

    def __init__(self, model: nn.Module, parallel_context: Any) -> None:
        self._mesh: Any = None
        if parallel_context is None:
            return
        check_expert_parallel(model, parallel_context)
        if parallel_context.get_tensor_parallel_world_size() > 1:
            self._mesh = _parallelize(model, parallel_context)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run (parts of) the model in the block; nothing to do on one rank."""
        if self._mesh is None:
            yield
            return
        from torchtitan.distributed.spmd_types import set_current_spmd_mesh

        with set_current_spmd_mesh(self._mesh):
            yield

    def gather(self, logits: torch.Tensor) -> torch.Tensor:
        """Whole logits `[..., V]` on every rank, from this rank's columns; differentiable."""
        if self._mesh is None:
            return logits
        import spmd_types as spmd

        group = self._mesh["tp"].get_group()
        # Every rank goes on with the same numbers, so each takes its own part of the gradient.
        whole: torch.Tensor = spmd.redistribute(logits, group, src=spmd.S(-1), dst=spmd.I)
        return whole


def _check_whole_world(parallel_context: Any) -> None:
    """TorchTitan makes its meshes of all processes, so these must be the tensor-parallel ranks."""
    size = parallel_context.get_tensor_parallel_world_size()
    world = dist.get_world_size() if dist.is_initialized() else 1
    if size == world:
        return
    stages = parallel_context.get_pipeline_parallel_world_size()
    replicas = parallel_context.get_data_parallel_size()
    raise ValueError(
        f"tensor_parallel_size={size} with pipeline_parallel_size={stages} and data_parallel_size="
        f"{replicas}, {world} processes in one world: TorchTitan's sharding is laid over all of "
        "them, which stages, and replicas of a model with experts, would divide; use "
        "tensor_parallel_size alone"
    )


def _parallelize(model: Any, parallel_context: Any) -> Any:
    tp_size = parallel_context.get_tensor_parallel_world_size()
    shard_attention(model, tp_size)
    _check_whole_world(parallel_context)
    use_this_device()
    from torchtitan.distributed.parallel_dims import ParallelDims
    from torchtitan.distributed.spmd_types import set_current_spmd_mesh, set_spmd_meshes
    from torchtitan.distributed.utils import set_spmd_backend

    dims = ParallelDims(
        dp_replicate=1, dp_shard=1, cp=1, tp=tp_size, pp=1, ep=1, world_size=tp_size
    )
    set_spmd_backend(dims.spmd_backend)
    dims.build_mesh()
    mesh = dims.spmd_dense_mesh()
    set_spmd_meshes(dense_mesh=mesh, sparse_mesh=None)
    # TorchTitan wraps each forward, so the exact ones must be in place before.
    make_exact(model)
    if parallel_context.get_expert_parallel_world_size() > 1:
        divide_experts(model, mesh["tp"])
    tied = tied_names(model)
    with set_current_spmd_mesh(mesh):
        model.parallelize(dims)
    _tie_again(model, tied)
    for module in model.modules():
        for tensor, layout in _states(module):
            _describe(tensor, layout, mesh["tp"])
    return mesh


def use_this_device() -> None:
    """Let TorchTitan make meshes on a host without an accelerator, where it assumes CUDA."""
    # DeviceMesh gives axes of size 1 a fake group, known once this is imported.
    import torch.testing._internal.distributed.fake_pg

    if torch.accelerator.is_available():
        return
    from torchtitan.distributed import parallel_dims
    from torchtitan.tools import utils

    utils.device_type = parallel_dims.device_type = "cpu"
    utils.device_module = torch.cpu


def _tie_again(model: nn.Module, tied: dict[Slot, str]) -> None:
    """Tied parameters are one again; `parallelize` gave each of their modules its own."""
    first: dict[str, torch.Tensor] = {}
    for slot, name in tied.items():
        kept = first.setdefault(name, tensor_in(slot))
        if kept is not tensor_in(slot):
            setattr(*slot, kept)


def _states(module: nn.Module) -> Iterator[tuple[torch.Tensor, Any]]:
    """Parameters and buffers of a module, with TorchTitan's layout of each."""
    config = getattr(module, "_sharding_config", None)
    layouts = (config.state_shardings or {}) if config is not None else {}
    for name, layout in layouts.items():
        tensor = getattr(module, name, None)
        if tensor is not None:
            yield tensor, layout


def _describe(tensor: torch.Tensor, layout: Any, tp_mesh: Any) -> None:
    """Note which share of the whole a tensor is, and add up the gradient of a replicated one.

    Every rank computes another part of the gradient of a replicated parameter (`R`);
    that of an invariant one (`I`) is whole on every rank.
    """
    import spmd_types as spmd

    kind, group = layout.per_axis_spmd_types().get("tp"), tp_mesh.get_group()
    if isinstance(kind, spmd.Shard):
        mark_shard(tensor, Shard(kind.dim, tp_mesh.get_local_rank(), group))
    elif kind is spmd.R and tensor.requires_grad:
        tensor.register_hook(partial(_add_up, group))


def _add_up(group: Any, grad: torch.Tensor) -> torch.Tensor:
    total = grad.clone()
    dist.all_reduce(total, group=group)
    return total
