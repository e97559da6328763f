"""One rank of an FSDP2 trainer: `push_worker.py CHECKPOINT URL [DIE_AT]`, run by torchrun.

With DIE_AT rank 0 kills itself as it sends its tensor of that number.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.serve.test_push import trainer
from vllm_graft import WeightError, push_weights
from vllm_graft.train import push


def main() -> None:
    """Push the trainer of `tests.serve.test_push`, then what all ranks must refuse."""
    checkpoint, url, *die_at = sys.argv[1:]
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = trainer(Path(checkpoint))
    for layer in model.model.layers.values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model.model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    if die_at:
        die(int(die_at[0]))
    push_weights(model, url)
    with torch.no_grad():
        if dist.get_rank() == 1:
            next(model.parameters()).to_local()[0, 0] = float("nan")
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
