"""Tensor parallelism on cards: two ranks over NCCL, and what one card gives with the same weights.

    PYTHONPATH=. VLLM_BATCH_INVARIANT=1 python benchmarks/cuda_ranks.py --json ranks.json

Each job is a torchrun of 1 or 2 ranks with `TrainableLLM` on a random Qwen3 in bf16 (`--shape`):
counts of `verify_exactness`, then loss and gathered gradients of `token_logprobs` over fixed
samples. Those of two ranks are compared with one card's. A job that fails is reported with its
error.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

SAMPLES = (5, 64, 130, 300)
"""Lengths of the samples of the training step."""
LIMIT_S = 480


def job(arch: str, ranks: int, checkpoint: str, graphs: str) -> dict[str, Any]:
    """What rank 0 of a torchrun job saved, or its error."""
    result = Path(checkpoint, f"{arch}.{ranks}.pt")
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", __file__, "--rank-of", arch]
    command += ["--checkpoint", checkpoint, "--result", str(result), "--graphs", graphs]
    log = result.with_suffix(".log")
    with log.open("w") as sink:
        done = subprocess.run(command, stdout=sink, stderr=sink, timeout=LIMIT_S, check=False)
    if done.returncode:
        text = log.read_text()
        return {"failed": text[text.find("Traceback") :][:4000]}
    saved: dict[str, Any] = torch.load(result, map_location="cpu")
    return saved


def one_rank(arch: str, checkpoint: str, result: str, graphs: str) -> None:
    """Serve, verify, train a step; rank 0 saves."""
    import torch.distributed as dist

    import vllm_graft
    from benchmarks.cuda_serving import GRAPHS
    from vllm_graft.serve.registry import BUILT_IN

    llm = vllm_graft.TrainableLLM(
        checkpoint, factory=BUILT_IN[arch], arch=arch, dtype="bfloat16", max_model_len=1280, seed=0,
        skip_tokenizer_init=True, enable_prefix_caching=True, gpu_memory_utilization=0.3,
        kv_cache_memory_bytes=1 << 30, tensor_parallel_size=int(os.environ["WORLD_SIZE"]),
        **GRAPHS[graphs],
    )  # fmt: skip
    report = vllm_graft.verify_exactness(llm, max_tokens=20, show=False)
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(0, 32000, (n,), generator=generator).tolist() for n in SAMPLES]
    loss = -torch.cat(llm.token_logprobs(samples, [1] * len(samples))).mean()
    loss.backward()
    saved = {
        "backend": dist.get_backend() if dist.is_initialized() else "none",
        "paths": {path.name: [path.equal, path.total] for path in report.paths},
        "loss": float(loss.detach()),
        "gradients": gradients(llm.model),
    }
    if int(os.environ["RANK"]) == 0:
        torch.save(saved, result)
    llm.llm_engine.engine_core.shutdown()


@torch.no_grad()
def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Whole ones under the checkpoint's names, on the host; the weights are gone afterwards."""
    from vllm_graft import export_weights

    for parameter in model.parameters():
        parameter.copy_(parameter.grad)
    return {name: g.cpu() for name, g in export_weights(model.model, model.name_mapping)}


def compared(alone: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    """Two ranks against one card: loss relative, gradients relative in the Frobenius norm."""
    apart = [
        float((two["gradients"][name].float() - g.float()).norm() / g.float().norm())
        for name, g in alone["gradients"].items()
    ]
    return {
        "loss": abs(two["loss"] / alone["loss"] - 1),
        "gradients, largest": float(torch.tensor(apart).max()),
        "gradients, median": float(torch.tensor(apart).median()),
    }


def main() -> None:
    """Run every job, print what there is so far after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=["Qwen3TorchTitan", "MegatronModel"])
    parser.add_argument("--shape", default="0.5b", help="of vllm_graft.bench.shapes")
    parser.add_argument("--graphs", default="none", help="of cuda_serving: none, graphs, inductor")
    parser.add_argument("--json", type=Path, help="write the results here")
    for hidden in ("--rank-of", "--checkpoint", "--result"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.rank_of:
        one_rank(chosen.rank_of, chosen.checkpoint, chosen.result, chosen.graphs)
        return
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        from vllm_graft.bench.shapes import write_in_child

        write_in_child(chosen.shape, Path(folder))
        for arch in chosen.arch:
            jobs = {ranks: job(arch, ranks, folder, chosen.graphs) for ranks in (1, 2)}
            shown = {
                ranks: {key: value for key, value in saved.items() if key != "gradients"}
                for ranks, saved in jobs.items()
            }
            if not any("failed" in saved for saved in jobs.values()):
                shown["two against one"] = compared(jobs[1], jobs[2])
            found[arch] = shown
            print(json.dumps({arch: shown}, indent=1), flush=True)
            if chosen.json:
                chosen.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
