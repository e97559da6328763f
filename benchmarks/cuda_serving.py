"""TorchTitan's Qwen3 through Graft on a card: speed, exactness and training steps.

    PYTHONPATH=. python benchmarks/cuda_serving.py speed --shape 0.5b
    PYTHONPATH=. python benchmarks/cuda_serving.py exact --shape 0.5b
    PYTHONPATH=. python benchmarks/cuda_serving.py step --shape 0.5b

Weights are random. `speed` pairs four engines, each in a process of its own, in
interleaved rounds: Graft, Graft under `VLLM_BATCH_INVARIANT=1`, vLLM's own model
and vLLM's Transformers backend. `exact` runs `verify_exactness` under
`VLLM_BATCH_INVARIANT=1`. `step` times token_logprobs, backward and AdamW on the
served module. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

FACTORY = "vllm_graft.examples.qwen3_torchtitan:build_qwen3_torchtitan"
GRAPHS = {
    "none": {"enforce_eager": True},
    # Decode steps as CUDA graphs, without Inductor.
    "graphs": {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}},
    "inductor": {},
}
SHAPE_8B = {
    "model_type": "qwen3",
    "use_sliding_window": False,
    "num_hidden_layers": 36,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "vocab_size": 151936,
}


def write(shape: str, folder: Path) -> None:
    """A checkpoint of a shape of `vllm_graft.bench.shapes`, or of Qwen3-8B."""
    from vllm_graft.bench import shapes

    shapes.SHAPES["8b"] = SHAPE_8B
    shapes.write_checkpoint(shape, folder)


def speed(checkpoint: str, args: argparse.Namespace) -> dict[str, Any]:
    """Prefill and decode of all contenders, in turns."""
    from vllm_graft.bench.report import as_json
    from vllm_graft.bench.run import contenders, measure
    from vllm_graft.bench.spec import Workload
    from vllm_graft.cli.target import register_target

    user_env = dict(os.environ)
    name = register_target(checkpoint, None, FACTORY)
    workload = Workload(
        batch_size=args.batch_size, prompt_len=args.prompt_len, output_len=args.output_len
    )
    engine = {
        "dtype": "bfloat16",
        "max_model_len": args.prompt_len + args.output_len,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "gpu_memory_utilization": 0.2,
        **GRAPHS[args.graphs],
    }
    with tempfile.TemporaryDirectory() as cache:
        entrants = contenders(
            arch=name,
            peers=["vllm", "transformers"],
            llm={"model": checkpoint, **engine},
            user_env=user_env,
            cache=Path(cache),
        )
        exact_env = {**entrants[0].env, "VLLM_BATCH_INVARIANT": "1"}
        entrants.insert(1, dataclasses.replace(entrants[0], name="graft-exact", env=exact_env))
        entrants = [one for one in entrants if one.name in args.only.split(",")]
        results = measure(entrants, workload, args.logs, lambda what, _: print(what, flush=True))
    return as_json(results, workload, {"architecture": name, **engine})


def trainable(checkpoint: str, args: argparse.Namespace) -> Any:
    """A `TrainableLLM` of TorchTitan's Qwen3."""
    import vllm_graft

    return vllm_graft.TrainableLLM(
        checkpoint,
        factory=FACTORY,
        dtype="bfloat16",
        max_model_len=1024,
        gpu_memory_utilization=0.5,
        skip_tokenizer_init=True,
        **GRAPHS[args.graphs],
    )


def exact(checkpoint: str, args: argparse.Namespace) -> dict[str, Any]:
    """Counts of equal log-probabilities, path by path."""
    import vllm_graft

    report = vllm_graft.verify_exactness(trainable(checkpoint, args))
    return {"paths": [dataclasses.astuple(path) for path in report.paths], "exact": report.exact}


def step(checkpoint: str, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a training step on the served module, and of a generation after it."""
    llm = trainable(checkpoint, args)
    sequences = torch.randint(5, 512, (args.batch_size, args.prompt_len + args.output_len))
    prompts = [args.prompt_len] * args.batch_size
    optimizer = torch.optim.AdamW(llm.model.parameters(), lr=1e-5, fused=torch.cuda.is_available())

    def once() -> None:
        scored = torch.cat(llm.token_logprobs(sequences.tolist(), prompts))
        (-scored.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()

    once()
    times = [seconds(once) for _ in range(5)]
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    return {
        "step_ms": 1e3 * statistics.median(times),
        "tokens": sequences.numel(),
        "peak_gib": peak,
    }


def seconds(run: Any) -> float:
    """Of one call, the device's work included."""
    begun = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def main() -> None:
    """Measure one thing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("speed", "exact", "step"))
    parser.add_argument("--shape", default="0.5b", help="0.5b, tiny or 8b")
    parser.add_argument("--checkpoint", type=Path, help="made here if it does not exist")
    parser.add_argument("--graphs", choices=tuple(GRAPHS), default="graphs")
    parser.add_argument("--only", default="graft,graft-exact,vllm,transformers")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--prompt-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if args.what != "speed" and torch.cuda.is_available():
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.checkpoint or Path(temporary)
        if not (folder / "config.json").exists():
            write(args.shape, folder)
        found = globals()[args.what](str(folder), args)
    found |= {"graphs": args.graphs, "shape": args.shape, "torch": torch.__version__}
    found["card"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    print(json.dumps(found))


if __name__ == "__main__":
    main()
