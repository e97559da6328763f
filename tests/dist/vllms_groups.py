"""A factory that looks at the context it gets from the engine."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from examples.custom_models.qwen3_torchtitan import build_qwen3_torchtitan


def build(vllm_config: Any, parallel_context: Any) -> nn.Module:
    """TorchTitan's Qwen3, if the context is vLLM's."""
    from vllm.distributed import parallel_state
    from vllm.platforms import current_platform

    context, config = parallel_context, vllm_config.parallel_config
    tp, pp = parallel_state.get_tp_group(), parallel_state.get_pp_group()
    assert context.get_tp_process_group() is tp.device_group
    assert context.get_tp_process_group() is not dist.group.WORLD
    assert context.get_pp_process_group() is pp.device_group
    assert context.get_tensor_parallel_rank() == tp.rank_in_group
    assert context.get_pipeline_parallel_rank() == pp.rank_in_group
    assert context.get_tensor_parallel_world_size() == config.tensor_parallel_size == tp.world_size
    assert context.get_pipeline_parallel_world_size() == pp.world_size
    assert context.get_data_parallel_size() == config.data_parallel_size
    mesh = context.tp_mesh()
    assert mesh.mesh_dim_names == ("tp",) and mesh.mesh.tolist() == tp.ranks
    assert mesh.get_group("tp") is tp.device_group
    assert mesh.device_type == current_platform.device_type
    print("VLLMS GROUPS", flush=True)
    return build_qwen3_torchtitan(vllm_config, parallel_context)
