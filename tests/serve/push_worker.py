"""A trainer's rank, by torchrun: `push_worker.py fsdp|tensor_parallel CHECKPOINT URL [DIE_AT]`.

With DIE_AT rank 0 kills itself as it sends its tensor of that number.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig

from examples.custom_models.qwen3_torchtitan import build_qwen3_torchtitan
from tests.serve.test_push import trainer
from vllm_graft import ParallelContext, WeightError, push_weights
from vllm_graft.train import push
from vllm_graft.weights.contents import Contents
from vllm_graft.weights.shards import is_share, local


def fsdp(checkpoint: Path) -> torch.nn.Module:
    """Every parameter divided among the ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = trainer(checkpoint)
    for layer in model.model.layers.values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model.model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return model


def tensor_parallel(checkpoint: Path) -> torch.nn.Module:
    """TorchTitan's own plan over the ranks; norms are whole on each."""
    config = SimpleNamespace(
        hf_config=AutoConfig.from_pretrained(checkpoint),
        model_config=SimpleNamespace(max_model_len=512, dtype=torch.float32),
    )
    ranks = ParallelContext(tensor_model_parallel_size=dist.get_world_size())
    model = build_qwen3_torchtitan(config, ranks)
    model.load_weights(Contents(trainer(checkpoint)).tensors())
    assert all(is_share(p) for name, p in model.named_parameters() if "norm" not in name)
    return model


def main() -> None:
    """Push the trainer of `tests.serve.test_push`, then what all ranks must refuse."""
    kind, checkpoint, url, *die_at = sys.argv[1:]
    dist.init_process_group("gloo")
    model = {"fsdp": fsdp, "tensor_parallel": tensor_parallel}[kind](Path(checkpoint))
    if die_at:
        die(int(die_at[0]))
    push_weights(model, url)
    with torch.no_grad():
        if dist.get_rank() == 1:
            local(next(model.parameters()))[0, 0] = float("nan")
    try:
        push_weights(model, url)
    except WeightError as error:
        print(f"RANK {dist.get_rank()} {error}")
    dist.destroy_process_group()


def die(count: int) -> None:
    """Let rank 0 vanish in the middle of its push."""
    stock, calls = push.digest, iter(range(count))

    def digest(tensor: torch.Tensor) -> int:
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return stock(tensor)

    push.digest, push.CHUNK = digest, 1 << 16


if __name__ == "__main__":
    main()
