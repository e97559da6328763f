"""A user's own DTensor plan on a hand-written model, over either kind of mesh."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from tests.serve.conftest import HF_NAMES
from tests.serve.library.my_library import MyModel, MyModelConfig
from vllm_graft import (
    VLLMModelForCausalLM,
    load_external_weights,
    replace_with_trainable_attention,
)

PLAN = {
    "tok_embeddings": RowwiseParallel(input_layouts=Replicate()),
    "layers.*.attention.wq": ColwiseParallel(),
    "layers.*.attention.wk": ColwiseParallel(),
    "layers.*.attention.wv": ColwiseParallel(),
    "layers.*.attention.wo": RowwiseParallel(),
    "layers.*.up": ColwiseParallel(),
    "layers.*.down": RowwiseParallel(),
    "output": ColwiseParallel(output_layouts=Replicate()),
}


class PlainForCausalLM(VLLMModelForCausalLM):
    """`my_library`'s model, its attention replaced."""

    def __init__(self, vllm_config: Any) -> None:
        super().__init__()
        hf_config = vllm_config.hf_config
        self.model = plain_model(hf_config)
        self.name_mapping = name_mapping(self.model)
        replace_with_trainable_attention(self.model)

    def get_input_embeddings(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.tok_embeddings(input_ids)

    def forward(self, input_ids: torch.Tensor, positions: Any = None, **_: Any) -> torch.Tensor:
        if input_ids.dim() == 2:
            return self.model(input_ids)
        return self.model(input_ids[None])[0]

    def compute_logits(self, hidden_states: torch.Tensor, _: Any = None) -> torch.Tensor:
        return self.model.output(hidden_states)

    def load_weights(self, weights_iter: Any) -> None:
        load_external_weights(
            model=self.model, weights_iter=weights_iter, name_mapping=self.name_mapping
        )


def plain_model(hf_config: Any) -> MyModel:
    """The hand-written model of a checkpoint."""
    return MyModel(
        MyModelConfig(
            vocab_size=hf_config.vocab_size,
            hidden_size=hf_config.hidden_size,
            n_heads=hf_config.num_attention_heads,
            n_kv_heads=hf_config.num_key_value_heads,
        )
    )


def name_mapping(model: nn.Module) -> dict[str, str]:
    """Checkpoint names as `tests.serve.conftest` writes them."""
    names = {}
    for ours, _ in model.named_parameters():
        theirs = f"model.{ours}" if ours.startswith("layers.") else ours
        for mine, hf in HF_NAMES.items():
            theirs = theirs.replace(mine, hf)
        names[theirs] = ours
    return names


def by_context(vllm_config: Any, parallel_context: Any) -> nn.Module:
    """The plan over the mesh that the context gives."""
    model = PlainForCausalLM(vllm_config)
    if parallel_context.get_tensor_parallel_world_size() > 1:
        parallelize_module(model.model, parallel_context.tp_mesh(), PLAN)
    return model.to(dtype=vllm_config.model_config.dtype)


def by_init_device_mesh(vllm_config: Any, parallel_context: Any) -> nn.Module:
    """The guide's own lines for the mesh."""
    model = PlainForCausalLM(vllm_config)
    if parallel_context is not None:
        tp_size = parallel_context.get_tensor_parallel_world_size()
        if tp_size > 1:
            tp_mesh: DeviceMesh = init_device_mesh("cpu", (tp_size,), mesh_dim_names=("tp",))
            parallelize_module(model.model, tp_mesh, PLAN)
    return model.to(dtype=vllm_config.model_config.dtype)
