"""`ParallelContext`: vLLM's process groups, handed to every factory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


@dataclass
class ParallelContext:
    """Sizes and groups of the parallelism vLLM runs this model with.

    Outside vLLM, where `torch.distributed` has exactly as many ranks as an axis (a factory called
    under torchrun), all ranks are the group of that axis.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    data_parallel_size: int = 1
    expert_parallel_size: int = 1
    """Ranks that share the experts between them; 1 without vLLM's `enable_expert_parallel`."""

    @classmethod
    def from_config(cls, parallel_config: Any) -> ParallelContext:
        """Read the sizes from a `vllm.config.ParallelConfig`."""
        tp, dp = parallel_config.tensor_parallel_size, parallel_config.data_parallel_size
        return cls(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=parallel_config.pipeline_parallel_size,
            data_parallel_size=dp,
            expert_parallel_size=tp * dp if parallel_config.enable_expert_parallel else 1,
        )

    def get_tensor_parallel_world_size(self) -> int:
        """Number of tensor-parallel ranks."""
        return self.tensor_model_parallel_size

    def get_pipeline_parallel_world_size(self) -> int:
        """Number of pipeline stages."""
        return self.pipeline_model_parallel_size

    def get_data_parallel_size(self) -> int:
        """Number of data-parallel replicas."""
        return self.data_parallel_size

    def get_expert_parallel_world_size(self) -> int:
        """Number of ranks that share the experts between them."""
        return self.expert_parallel_size

    def get_tensor_parallel_rank(self) -> int:
        """This process's tensor-parallel rank; 0 where there is no group."""
        group = self.get_tp_process_group()
        return 0 if group is None else dist.get_rank(group)

    def get_pipeline_parallel_rank(self) -> int:
        """This process's pipeline stage; 0 where there is no group."""
        group = self.get_pp_process_group()
        return 0 if group is None else dist.get_rank(group)

    def get_tp_process_group(self) -> dist.ProcessGroup | None:
        """The tensor-parallel group of vLLM, None before it exists; outside vLLM see above."""
        return _group("tp", self.tensor_model_parallel_size)

    def get_pp_process_group(self) -> dist.ProcessGroup | None:
        """The pipeline-parallel group of vLLM, None before it exists; outside vLLM see above."""
        return _group("pp", self.pipeline_model_parallel_size)

    def stage_layers(self, num_layers: int) -> range:
        """The layers of this pipeline stage, as vLLM divides them; all of them without stages.

        `VLLM_PP_LAYER_PARTITION` is honoured. The first stage has layer 0 and the
        embedding, the last one has layer `num_layers - 1`, norm and head.

        Args:
            num_layers: of the whole model.

        Raises:
            ValueError: a stage would have no layer.
        """
        stages = self.pipeline_model_parallel_size
        if stages == 1:
            return range(num_layers)
        from vllm_graft.serve._vllm_pp import layers_of_stage

        layers = [layers_of_stage(num_layers, stage, stages) for stage in range(stages)]
        if not all(layers):
            raise ValueError(
                f"pipeline_parallel_size={stages}, but the model has {num_layers} layers, divided "
                f"{'|'.join(str(len(own)) for own in layers)}: each stage needs at least one. Use "
                f"pipeline_parallel_size <= {num_layers}, or another VLLM_PP_LAYER_PARTITION"
            )
        return layers[self.get_pipeline_parallel_rank()]

    def tp_mesh(self, device_type: str | None = None) -> DeviceMesh:
        """A one-dimensional mesh `("tp",)` over the ranks of `get_tp_process_group()`.

        Args:
            device_type: `"cuda"`, `"cpu"`; by default that of vLLM's platform.

        Raises:
            RuntimeError: there is no group.
        """
        group = self.get_tp_process_group()
        if group is None:
            raise RuntimeError(
                "tp_mesh: vLLM has no process groups yet; call it in the factory, which vLLM runs "
                "after it has initialized them, or under torchrun with "
                f"{self.tensor_model_parallel_size} ranks, after init_process_group()"
            )
        from vllm_graft.serve._vllm import platform_device

        kind = platform_device() if device_type is None else device_type
        return DeviceMesh.from_group(group, kind, mesh_dim_names=("tp",))


def _group(axis: str, size: int) -> dist.ProcessGroup | None:
    if not dist.is_available() or not dist.is_initialized():
        return None
    from vllm_graft.serve._vllm import process_group

    group: dist.ProcessGroup | None = process_group(axis)
    if group is None and dist.get_world_size() == size:
        return dist.group.WORLD
    return group
