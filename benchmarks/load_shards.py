"""What each of two tensor-parallel ranks reads of a checkpoint.

    PYTHONPATH=. python benchmarks/load_shards.py [--json out.json]

Writes a random Qwen3 checkpoint (bf16, two layers as wide as an 8B model's, 1.3 GB) and two
copies to a temporary folder, starts two ranks, and has each load its half of TorchTitan's
Qwen3 (`--arch MegatronModel`: Megatron's; `DTensor`: TorchTitan's under a plan of PyTorch's, so
DTensors) from vLLM's own safetensors iterator. `--num-experts 64` makes it a mixture of experts,
`--expert-parallel` gives each rank half of those. Three figures, as parts of the checkpoint:

- *taken*: bytes that operations read out of the mapped tensors. Views read nothing.
- *from disk, alone*: `read_bytes` of /proc/self/io while loading a copy that only this rank
  uses, its pages dropped from the cache before (so this needs Linux and a disk). Includes what
  the kernel reads ahead.
- *from disk, both*: the same for one copy that both ranks load at once, added up.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

RANKS = 2
ARCHS = ("Qwen3TorchTitan", "MegatronModel", "DTensor")
MB = 1_000_000


class Taken(TorchDispatchMode):
    """Counts the bytes that operations in the block read out of watched tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._watched: set[int] = set()

    def watch(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count reads of this tensor and of its views from now on."""
        self._watched.add(tensor.untyped_storage().data_ptr())
        return tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [a for a in args if isinstance(a, torch.Tensor) and self._is_watched(a)]
        if inputs and not self._is_watched(out):
            # Indexing reads what comes out, everything else all that goes in.
            read = [out] if func.overloadpacket is torch.ops.aten.index else inputs
            self.bytes += sum(tensor.nbytes for tensor in read)
        return out

    def _is_watched(self, tensor: Any) -> bool:
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
            return False
        return tensor.untyped_storage().data_ptr() in self._watched


def write_checkpoint(folder: Path, sizes: dict[str, int]) -> int:
    """A random Qwen3 checkpoint in Hugging Face format; returns the bytes of its tensors."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    heads = sizes["hidden_size"] // 64
    attention = {
        "num_attention_heads": heads, "num_key_value_heads": heads // 2, "head_dim": 64,
        "tie_word_embeddings": False,
    }  # fmt: skip
    if sizes["num_experts"]:
        width = {"moe_intermediate_size": sizes["intermediate_size"]}
        model: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **width, **attention))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, **attention))
    model.bfloat16()
    model.save_pretrained(folder, max_shard_size="300MB")
    return sum(parameter.nbytes for parameter in model.parameters())


def build(folder: Path, arch: str, *, expert_parallel: bool) -> Any:
    """This rank's half of the model."""
    from transformers import AutoConfig

    from vllm_graft import ParallelContext
    from vllm_graft.serve.importing import Importable, locate
    from vllm_graft.serve.registry import BUILT_IN

    vllm_config = SimpleNamespace(
        hf_config=AutoConfig.from_pretrained(folder),
        model_config=SimpleNamespace(dtype=torch.bfloat16, max_model_len=512),
    )
    context = ParallelContext(
        tensor_model_parallel_size=RANKS, expert_parallel_size=RANKS if expert_parallel else 1
    )
    if arch == "DTensor":
        return under_a_plan(vllm_config, context)
    return locate(Importable.parse(BUILT_IN[arch]))(vllm_config, context)


def under_a_plan(vllm_config: Any, context: Any) -> Any:
    """TorchTitan's dense Qwen3, its parameters DTensors over the ranks."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    from examples.custom_models.qwen3_torchtitan import Qwen3TorchTitanForCausalLM

    columns = ("attention.qkv_linear.*", "feed_forward.w1", "feed_forward.w3")
    plan = {f"layers.*.{name}": ColwiseParallel() for name in columns}
    plan |= {f"layers.*.{name}": RowwiseParallel() for name in ("attention.wo", "feed_forward.w2")}
    plan |= {"tok_embeddings": RowwiseParallel(), "lm_head": ColwiseParallel()}
    model = Qwen3TorchTitanForCausalLM(vllm_config)
    parallelize_module(model.model, context.tp_mesh(), plan)
    return model.bfloat16()


def stream(folder: Path, taken: Taken) -> Iterator[tuple[str, torch.Tensor]]:
    """The checkpoint as vLLM's default loader hands it to `load_weights`."""
    from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator

    files = sorted(map(str, folder.glob("*.safetensors")))
    for name, tensor in safetensors_weights_iterator(files, use_tqdm_on_load=False):
        yield name, taken.watch(tensor)


def load(model: Any, folder: Path) -> dict[str, float]:
    """Load in this process: bytes taken, bytes from disk, seconds. All ranks at once."""
    dist.barrier()
    before, start = disk_bytes(), time.perf_counter()
    with Taken() as taken:
        model.load_weights(stream(folder, taken))
    seconds = time.perf_counter() - start
    return {"taken": taken.bytes, "disk": disk_bytes() - before, "seconds": seconds}


def disk_bytes() -> int:
    """What this process has had read from disk so far."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise RuntimeError("no read_bytes in /proc/self/io; this benchmark needs Linux")


def drop_cache(folder: Path) -> None:
    """Write the files out and take their pages from the cache."""
    for path in folder.glob("*.safetensors"):
        file = os.open(path, os.O_RDWR)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def rank_main(folder: Path, arch: str, *, expert_parallel: bool) -> None:
    """One rank: load from its own copy, then from the one that all share."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = build(folder / "shared", arch, expert_parallel=expert_parallel)
    alone = load(model, folder / f"rank{rank}")
    both = load(model, folder / "shared")
    (folder / f"{rank}.json").write_text(json.dumps({"alone": alone, "both": both}))
    dist.destroy_process_group()


def measure(sizes: dict[str, int], arch: str, *, expert_parallel: bool) -> dict[str, Any]:
    """Write a checkpoint, load it on two ranks, return the figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_checkpoint(folder / "shared", sizes)
        for rank in range(RANKS):
            shutil.copytree(folder / "shared", folder / f"rank{rank}")
        for copy in folder.iterdir():
            drop_cache(copy)
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={RANKS}"]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", __file__]
        command += ["--rank-of", name, "--arch", arch, *["--expert-parallel"] * expert_parallel]
        subprocess.run(command, stdout=sys.stderr, check=True)
        ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]
    return {
        "checkpoint_bytes": size,
        "taken_bytes": [rank["alone"]["taken"] for rank in ranks],
        "disk_alone_bytes": [rank["alone"]["disk"] for rank in ranks],
        "disk_both_bytes": sum(rank["both"]["disk"] for rank in ranks),
        "seconds": [rank["alone"]["seconds"] for rank in ranks],
    }


def table(figures: dict[str, Any]) -> str:
    """The figures for people."""
    size = figures["checkpoint_bytes"]
    part = lambda n: f"{n / MB:8,.1f} MB {n / size:7.1%}"  # noqa: E731
    lines = [f"{'checkpoint':<24}{part(size)}"]
    for rank in range(RANKS):
        lines.append(f"{f'rank {rank}: taken':<24}{part(figures['taken_bytes'][rank])}")
        lines.append(f"{'  from disk, alone':<24}{part(figures['disk_alone_bytes'][rank])}")
    return "\n".join([*lines, f"{'from disk, both':<24}{part(figures['disk_both_bytes'])}"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    defaults = {"hidden_size": 4096, "intermediate_size": 12288, "vocab_size": 32000}
    for name, value in {**defaults, "num_hidden_layers": 2, "num_experts": 0}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--arch", choices=ARCHS, default=ARCHS[0], help="default: %(default)s")
    parser.add_argument("--expert-parallel", action="store_true", help="whole experts per rank")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    options = vars(parser.parse_args())
    out, folder = options.pop("json"), options.pop("rank_of")
    arch, expert_parallel = options.pop("arch"), options.pop("expert_parallel")
    if folder is not None:
        rank_main(folder, arch, expert_parallel=expert_parallel)
        return
    figures = measure(options, arch, expert_parallel=expert_parallel)
    print(table(figures))
    if out is not None:
        out.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
