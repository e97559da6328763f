"""TorchTitan's Qwen3 or DeepSeek V3 through Graft on a card: speed, exactness, training steps.

    PYTHONPATH=. python benchmarks/cuda_serving.py speed --shape 0.5b
    PYTHONPATH=. python benchmarks/cuda_serving.py exact --shape 0.5b
    PYTHONPATH=. python benchmarks/cuda_serving.py exact --shape deepseek
    PYTHONPATH=. python benchmarks/cuda_serving.py step --shape 0.5b

Weights are random. `speed` pairs four engines, each in a process of its own, in
interleaved rounds: Graft, Graft under `VLLM_BATCH_INVARIANT=1`, vLLM's own model
and vLLM's Transformers backend; `--shape 8b --dummy` is Qwen3-8B, and `--profile`
adds the kernels of a decode step. An engine that does not start is left out. `exact`
runs `verify_exactness` under `VLLM_BATCH_INVARIANT=1`. `step` times token_logprobs,
backward and AdamW on the served module. Every result is printed when it is there, and
`--json` holds what there is so far.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

QWEN3 = "vllm_graft.examples.qwen3_torchtitan:build_qwen3_torchtitan"
FACTORIES = {"deepseek": "vllm_graft.examples.deepseek_v3_torchtitan:build_deepseek_v3_torchtitan"}
"""Of shapes that are no Qwen3."""
GRAPHS = {
    "none": {"enforce_eager": True},
    # Decode steps as CUDA graphs, without Inductor.
    "graphs": {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}},
    "inductor": {},
}
SETTLE_S = 0.2
"""Pause before a round, in which what the one before has left behind comes to rest."""
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
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": False,
}


def write(shape: str, folder: Path) -> None:
    """A checkpoint of a shape of `vllm_graft.bench.shapes`, or the config of Qwen3-8B alone."""
    from vllm_graft.bench import shapes

    if shape == "8b":
        config = {**SHAPE_8B, "architectures": ["Qwen3ForCausalLM"], "torch_dtype": "bfloat16"}
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
    else:
        shapes.write_checkpoint(shape, folder)


def speed(checkpoint: str, args: argparse.Namespace) -> dict[str, Any]:
    """Prefill and decode of all contenders, in turns, for every batch size."""
    from vllm_graft.bench.process import Worker

    engine = {
        "model": checkpoint,
        "dtype": "bfloat16",
        "max_model_len": args.prompt_len + args.output_len,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "gpu_memory_utilization": 0.2,
        "kv_cache_memory_bytes": args.kv_gib << 30,
        **({"load_format": "dummy"} if args.dummy else {}),
        **GRAPHS[args.graphs],
    }
    found: dict[str, Any] = {"settings": engine, "prompt_len": args.prompt_len}
    with tempfile.TemporaryDirectory() as cache, ExitStack() as stack:
        entrants = chosen(engine, args, Path(cache))
        workers = {e.name: stack.enter_context(Worker(e, log_of(e, args))) for e in entrants}
        measure(started(workers), args, found)
    return found


def measure(workers: dict[str, Any], args: argparse.Namespace, found: dict[str, Any]) -> None:
    """Rounds, and kernels where asked for, of every batch size."""
    from vllm_graft.bench.spec import Workload

    for batch_size in args.batch_sizes:
        workload = Workload(
            batch_size=batch_size,
            prompt_len=args.prompt_len,
            output_len=args.output_len,
            rounds=args.rounds,
        )
        tell(found, f"batch {batch_size}", interleaved(workers, workload), args)
        if args.profile:
            kernels = {name: worker.kernels(workload) for name, worker in workers.items()}
            tell(found, f"kernels, batch {batch_size}", kernels, args)


def log_of(entrant: Any, args: argparse.Namespace) -> Path:
    """Where a contender's process prints."""
    log: Path = args.logs / f"{entrant.name}.log"
    return log


def started(workers: dict[str, Any]) -> dict[str, Any]:
    """Those whose engine could be built. All start at once: compiling runs on one core each."""
    from vllm_graft.bench.process import WorkerError

    able = {}
    with ThreadPoolExecutor(len(workers)) as pool:
        starts = {name: pool.submit(worker.start) for name, worker in workers.items()}
        for name, start in starts.items():
            try:
                print(name, "started in", *start.result(), flush=True)
                able[name] = workers[name]
            except WorkerError as error:
                print(name, "did not start:", error, flush=True)
    return able


def tell(found: dict[str, Any], name: str, result: Any, args: argparse.Namespace) -> None:
    """Print a result and keep it: a run that is stopped has lost nothing that was measured."""
    found[name] = result
    print(json.dumps({name: result}), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found))


def chosen(engine: dict[str, Any], args: argparse.Namespace, cache: Path) -> list[Any]:
    """The contenders of `--only`; `graft-exact` is Graft under `VLLM_BATCH_INVARIANT=1`."""
    from vllm_graft.bench.run import contenders
    from vllm_graft.cli.target import register_target

    user_env = dict(os.environ)
    arch = register_target(engine["model"], None, FACTORIES.get(args.shape, QWEN3))
    peers = ["vllm", "transformers"]
    made = contenders(arch=arch, peers=peers, llm=engine, user_env=user_env, cache=cache)
    exact_env = {**made[0].env, "VLLM_BATCH_INVARIANT": "1"}
    made.insert(1, dataclasses.replace(made[0], name="graft-exact", env=exact_env))
    return [entrant for entrant in made if entrant.name in args.only.split(",")]


def interleaved(workers: dict[str, Any], workload: Any) -> dict[str, Any]:
    """Milliseconds over rounds in turns, after one that does not count; see `summary`."""
    names = list(workers)
    rounds: dict[str, list[Any]] = {name: [] for name in names}
    for seed in range(workload.rounds + 1):
        first = seed % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(SETTLE_S)
            measured = workers[name].round(workload, seed)
            if seed:
                decode_s = measured.total_s - measured.prefill_s
                step_s = decode_s / (workload.output_len - 1)
                rounds[name].append([1e3 * measured.prefill_s, 1e3 * step_s])
    return {name: summary(rounds[name], rounds[names[0]]) for name in names}


def summary(rounds: list[list[float]], of_first: list[list[float]]) -> dict[str, Any]:
    """Medians, those of the ratios to the first contender's in the same round, and all rounds."""
    pairs = zip(rounds, of_first, strict=True)
    ratios = [[mine / other for mine, other in zip(*pair, strict=True)] for pair in pairs]
    prefill, step = map(statistics.median, zip(*rounds, strict=True))
    over = [statistics.median(column) for column in zip(*ratios, strict=True)]
    return {"prefill_ms": prefill, "decode_step_ms": step, "over first": over, "rounds": rounds}


def trainable(checkpoint: str, args: argparse.Namespace) -> Any:
    """A `TrainableLLM` of TorchTitan's model."""
    import vllm_graft

    return vllm_graft.TrainableLLM(
        checkpoint,
        factory=FACTORIES.get(args.shape, QWEN3),
        dtype="bfloat16",
        max_model_len=1280,
        gpu_memory_utilization=0.2,
        kv_cache_memory_bytes=args.kv_gib << 30,
        skip_tokenizer_init=True,
        logprobs_mode=args.logprobs_mode,
        **({"load_format": "dummy"} if args.dummy else {}),
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
    sequences = torch.randint(5, 512, (args.batch_sizes[0], args.prompt_len + args.output_len))
    prompts = [args.prompt_len] * args.batch_sizes[0]
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
    parser.add_argument("--shape", default="0.5b", help="0.5b, deepseek, tiny or 8b")
    parser.add_argument("--checkpoint", type=Path, help="made here if it does not exist")
    parser.add_argument("--graphs", choices=tuple(GRAPHS), default="graphs")
    parser.add_argument("--logprobs-mode", default="raw_logprobs", help="of exact and step")
    parser.add_argument("--only", default="graft,graft-exact,vllm,transformers")
    parser.add_argument("--dummy", action="store_true", help="engines make their own weights")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=128)
    # Engines that start together on one card cannot measure what is free.
    parser.add_argument("--kv-gib", type=int, default=4, help="memory of each engine's cache")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--profile", action="store_true", help="kernels of a decode step too")
    parser.add_argument("--json", type=Path, help="file for the results")
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
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    tell(found, "card", card, args)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
