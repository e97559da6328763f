"""Check and time the attention kernels of training and serving on one card.

    PYTHONPATH=. python benchmarks/cuda_kernels.py

Needs torch and the torch part of vllm_graft, no vLLM (`--kernel vllm` runs
vLLM's op instead of PyTorch's, where vLLM is installed). Correctness first:
forward and gradients against float64, and serving from a paged cache against
the packed training forward, bit for bit. Then speed and memory, against
ceilings measured on the same card. A short table comes last, all figures go to
a JSON file, and the exit code is 1 when a check fails. `--device cpu` runs small
sizes through `sdpa_packed`, which promises no bit equality, and times nothing.

Legend: T packed tokens, B samples, L length, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.attention_kernels import (
    KERNELS,
    Kernel,
    Pages,
    Shape,
    Tensors,
    borders_of,
    poison,
    random_qkv,
    shapes,
    variants,
)
from vllm_graft.attention.cuda import varlen_packed, varlen_parameters, window_of
from vllm_graft.attention.kernels import AttentionSpec, attend, sdpa_packed

FORWARD_LIMIT = 4e-3
"""Relative error of bf16 outputs, per sample. Rounding to bf16 is off by 2**-9 =
1.95e-3 at most, and it happens twice: to the probabilities before they meet V,
and to the output."""

GRADIENT_LIMIT = 8e-3
"""Relative error of bf16 gradients. Four roundings: the output that the backward
reads, the probabilities, their gradient, and the result."""

FLOAT32_LIMIT = 1e-5
"""Relative error of float32, which goes through sdpa without TF32: rounding is
6e-8, sums of some hundred products bring it near 1e-6, and TF32 would show as 3e-4."""

ODD_LENGTHS = (1, 17, 127, 129, 333, 515)
"""One token, and lengths beside the tile edges of the kernels (64, 128, 256, 512)."""

CHUNK = 96
"""Tokens per step of the chunked prefill; no multiple or divisor of a tile edge."""

Record = dict[str, Any]


# --- correctness ----------------------------------------------------------------------------


def record(check: str, shape: Shape, value: float, limit: float) -> Record:
    """One result; `value` must not exceed `limit`, and NaN fails."""
    ok = value <= limit
    return {"check": check, "shape": shape.name, "value": value, "limit": limit, "ok": ok}


def relative_error(out: torch.Tensor, ref: torch.Tensor, lengths: list[int]) -> float:
    """Largest error of a sample, `|out - ref| / |ref|`; NaN stays NaN.

    The reference's norm counts at least as much as the whole batch has per
    element: the exact gradient of a sample of one token is zero.
    """
    out, mean_square = out.double(), ref.square().mean()
    worst = []
    for a, b in zip(out.split(lengths), ref.split(lengths), strict=True):
        norm = torch.maximum(b.square().sum(), mean_square * b.numel())
        worst.append(((a - b).square().sum() / norm).sqrt())
    return float(torch.stack(worst).max())


def forward_and_gradients(
    attention: Callable[..., torch.Tensor],
    inputs: Tensors,
    grad_out: torch.Tensor | None,
    borders: torch.Tensor,
    spec: AttentionSpec,
) -> list[torch.Tensor]:
    """`[out, dq, dk, dv]`, or `[out]` without `grad_out`."""
    if grad_out is None:
        with torch.no_grad():
            return [attention(*inputs, borders, spec)]
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attention(*leaves, borders, spec)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


def check_float64(
    kernel: Kernel, shape: Shape, device: str, lengths: list[int], dtype: torch.dtype
) -> list[Record]:
    """Forward and gradients of packed odd samples against `sdpa_packed` in float64."""
    inputs = random_qkv(shape, sum(lengths), device, dtype)
    grad_out = None
    if kernel.differentiable:
        grad_out = torch.randn_like(inputs[0][..., : shape.v_dim])
    poison(inputs[0])
    borders = borders_of(lengths)
    got = forward_and_gradients(kernel.train, inputs, grad_out, borders, shape.spec)
    q, k, v = (x.double() for x in inputs)
    grad_out = None if grad_out is None else grad_out.double()
    want = forward_and_gradients(sdpa_packed, (q, k, v), grad_out, borders, shape.spec)
    limits = [FORWARD_LIMIT, *[GRADIENT_LIMIT] * 3]
    if dtype == torch.float32:
        limits = [FLOAT32_LIMIT] * 4
    title = f"vs float64, {str(dtype).removeprefix('torch.')}"
    return [
        record(f"{name} {title}", shape, relative_error(a, b, lengths), limit)
        for name, a, b, limit in zip(("out", "dq", "dk", "dv"), got, want, limits, strict=False)
    ]


def check_serving(kernel: Kernel, shape: Shape, device: str, lengths: list[int]) -> list[Record]:
    """Serving against the packed training forward: elements that differ, over all tokens.

    A kernel without the promise may be off by the error of both sides instead.
    """
    q, k, v = random_qkv(shape, sum(lengths), device)
    pages = Pages.of(k, v, lengths, kernel.page_size, kernel.fill)
    serve = partial(serve_in_steps, kernel, shape, q, pages, lengths)
    mixed = [(1, CHUNK)[i % 2] for i in range(len(lengths))]
    poison(q)
    with torch.no_grad():
        trained = kernel.train(q, k, v, borders_of(lengths), shape.spec)
        served = {
            "decode": serve([1] * len(lengths)),
            "chunked prefill": serve([CHUNK] * len(lengths)),
            "decode beside prefill": serve(mixed),
            "alone": alone(kernel, shape, (q, k, v), lengths),
        }
    results = []
    for name, out in served.items():
        title, value, limit = f"{name} vs packed, differing", float((out != trained).sum()), 0.0
        if not kernel.exact:
            error = relative_error(out, trained.double(), lengths)
            title, value, limit = f"{name} vs packed, error", error, 2 * FORWARD_LIMIT
        results.append(record(title, shape, value, limit))
    return results


def serve_in_steps(
    kernel: Kernel,
    shape: Shape,
    q: torch.Tensor,
    pages: Pages,
    lengths: list[int],
    steps: list[int],
) -> torch.Tensor:
    """Serve the samples in one batch, `steps` more tokens of each at a time; `[T, N, Hv]`.

    Samples that have ended stay in the batch and repeat their last token; the
    repeats must agree as well.
    """
    starts = borders_of(lengths)[:-1].tolist()
    out = q.new_full((*q.shape[:2], shape.v_dim), torch.nan)
    done = [0] * len(lengths)
    while done != lengths:
        total = [min(d + s, n) for d, s, n in zip(done, steps, lengths, strict=True)]
        new = [max(t - d, 1) for t, d in zip(total, done, strict=True)]
        spans = zip(starts, total, new, strict=True)
        rows = torch.cat([torch.arange(s + t - m, s + t) for s, t, m in spans]).to(q.device)
        out[rows] = kernel.serve(q[rows], pages, new, total, shape.spec)
        done = total
    return out


def alone(kernel: Kernel, shape: Shape, inputs: Tensors, lengths: list[int]) -> torch.Tensor:
    """Every sample as a batch of its own, through the training forward."""
    parts = zip(*(x.split(lengths) for x in inputs), strict=True)
    return torch.cat(
        [kernel.train(*part, borders_of([len(part[0])]), shape.spec) for part in parts]
    )


def check_all(kernel: Kernel, device: str, *, small: bool) -> list[Record]:
    """Every check of every shape."""
    lengths = [1, 5, 17] if small else list(ODD_LENGTHS)
    results: list[Record] = []
    for shape in filter(kernel.takes, variants(shapes(small=small))):
        results += check_float64(kernel, shape, device, lengths, torch.bfloat16)
        if kernel.differentiable and shape.name == "GQA":
            dispatched = replace(kernel, train=attend)  # what models call; it falls back to sdpa
            results += check_float64(dispatched, shape, device, lengths, torch.float32)
        if shape.causal:
            results += check_serving(kernel, shape, device, lengths)
    return results


# --- speed and memory -----------------------------------------------------------------------


def median_ms(work: Callable[[], object], repeats: int = 15, warm_up: int = 4) -> float:
    """Median milliseconds of `work` on the device, by CUDA events."""
    times: list[float] = []
    for turn in range(warm_up + repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        if turn >= warm_up:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def ceilings() -> dict[str, float]:
    """What this card does at most: bf16 TFLOP/s of a product, GB/s of a copy (read + written)."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    tflops = 2 * n**3 / median_ms(lambda: a @ b) / 1e9
    source = torch.randint(0, 255, (1 << 32,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / median_ms(lambda: target.copy_(source)) / 1e6
    return {"matmul_tflops": tflops, "copy_gbs": bandwidth}


def peak_mib(work: Callable[[], object]) -> float:
    """Device memory that `work` takes on top of what was there, in MiB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def time_training(kernel: Kernel, shape: Shape, lengths: list[int], title: str) -> Record:
    """Forward, and forward with backward, of packed samples; `sdpa_packed` beside it."""
    inputs = random_qkv(shape, sum(lengths), "cuda")
    grad_out = torch.randn_like(inputs[0][..., : shape.v_dim])
    result: Record = {"work": title, "shape": shape.name}
    for name, attention in (("kernel", kernel.train), ("sdpa", sdpa_packed)):
        args = (inputs, grad_out if kernel.differentiable else None)
        run = partial(
            forward_and_gradients, attention, borders=borders_of(lengths), spec=shape.spec
        )
        try:
            figures = time_one(shape, lengths, partial(run, inputs, None), partial(run, *args))
        except torch.OutOfMemoryError:
            figures = {"out_of_memory": True}
        result |= {f"{name}_{figure}": value for figure, value in figures.items()}
    return result


def time_one(
    shape: Shape,
    lengths: list[int],
    forward: Callable[[], list[torch.Tensor]],
    both: Callable[[], list[torch.Tensor]],
) -> Record:
    """Milliseconds, TFLOP/s, peak memory, and whether two runs give the same bits."""
    forward_ms, both_ms = median_ms(forward), median_ms(both)
    first, second = both(), both()
    repeats = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    figures: Record = {
        "forward_ms": forward_ms,
        "forward_tflops": shape.flop(lengths) / forward_ms / 1e9,
    }
    if len(first) > 1:
        backward_flop = shape.flop(lengths, backward=True)
        figures["both_ms"] = both_ms
        figures["backward_tflops"] = backward_flop / (both_ms - forward_ms) / 1e9
    del first, second
    return figures | {"peak_mib": peak_mib(both), "repeats": repeats}


def time_decode(kernel: Kernel, shape: Shape, batch: int, context: int) -> Record:
    """One token for each of `batch` samples; GB/s counts every cached key and value once."""
    total = [context] * batch
    q, k, v = random_qkv(shape, context * batch, "cuda")
    pages, q = Pages.of(k, v, total, kernel.page_size, kernel.fill), q[:batch].clone()
    gigabytes = shape.cached_bytes(context * batch) / 1e6
    result: Record = {"work": f"decode {batch} x {context}", "shape": shape.name}
    with torch.no_grad():
        ms = median_ms(lambda: kernel.serve(q, pages, [1] * batch, total, shape.spec))
        result |= {"paged_ms": ms, "paged_gbs": gigabytes / ms}
        if kernel.train is varlen_packed:
            for name, max_q in (("fixed_split", 2), ("free_split", 1)):
                ms = median_ms(contiguous_decode((q, k, v), total, shape.spec, max_q))
                result |= {f"{name}_ms": ms, f"{name}_gbs": gigabytes / ms}
    return result


def contiguous_decode(
    inputs: Tensors, total: list[int], spec: AttentionSpec, max_q: int
) -> Callable[[], object]:
    """The kernel alone on a packed cache. `max_q=1` lets FlashAttention 2 choose its splits."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = inputs
    v = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
    cu_q, cu_k = (borders_of(x).to(q.device) for x in ([1] * len(total), total))
    options: Record = {"scale": spec.scale, "window_size": window_of(spec)}
    if "enable_gqa" in varlen_parameters():
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    if "num_splits" in varlen_parameters() and max_q > 1:
        options["num_splits"] = 1
    return partial(varlen_attn, q, k, v, cu_q, cu_k, max_q, max(total), **options)


def time_all(kernel: Kernel) -> list[Record]:
    """Speed and memory of every shape."""
    results = []
    for shape in filter(kernel.takes, shapes(small=False)):
        packed = [1023 + 2 * n for n in range(8)]
        batch = 16 if shape.heads * shape.kv_heads > 1024 else 64
        results += [
            time_training(kernel, shape, [8192], "one sample of 8192"),
            time_training(kernel, shape, packed, "8 samples of about 1030"),
            time_decode(kernel, shape, batch, 4097),
        ]
        torch.cuda.empty_cache()
    return results


# --- report ---------------------------------------------------------------------------------


def machine(device: str) -> dict[str, str]:
    """Versions, card and driver."""
    facts = {"torch": torch.__version__, "python": sys.version.split()[0], "device": device}
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False)
        card = torch.cuda.get_device_name()
        facts |= {"card": card, "driver": driver.stdout.strip(), "cuda": str(torch.version.cuda)}
    return facts


def print_report(report: Record) -> None:
    """A line per check and per timing."""
    for r in report["checks"]:
        mark = "ok  " if r["ok"] else "FAIL"
        print(f"{mark} {r['shape']:18} {r['check']:42} {r['value']:<10.4g} <= {r['limit']:.4g}")
    print("\n" + ", ".join(f"{k} {v}" for k, v in report["machine"].items()))
    if "ceilings" in report:
        top = report["ceilings"]
        print(f"ceilings: {top['matmul_tflops']:.0f} TFLOP/s, {top['copy_gbs']:.0f} GB/s")
    for r in report.get("speed", []):
        figures = [f"{k} {v:.4g}" for k, v in r.items() if isinstance(v, float | bool)]
        print(f"{r['shape']:10} {r['work']:24} " + ", ".join(figures))
    failed = sum(not r["ok"] for r in report["checks"])
    print(f"{report['kernel']}: {len(report['checks'])} checks, {failed} failed")


def main(argv: list[str] | None = None) -> int:
    """Run everything; 1 when a check failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--kernel", choices=["torch", "vllm"], default="torch")
    parser.add_argument("--checks-only", action="store_true", help="time nothing")
    parser.add_argument("--seed", type=int, help="of the random data; drawn anew by default")
    parser.add_argument("--json", type=Path, help="cuda_kernels.json, in $OUT if set, by default")
    args = parser.parse_args(argv)
    seed = torch.seed() if args.seed is None else args.seed
    torch.manual_seed(seed)
    on_card = args.device == "cuda"
    tested = KERNELS[args.kernel if on_card else "sdpa"]
    report: Record = {"machine": machine(args.device), "seed": seed, "kernel": tested[0].name}
    checks = (check_all(kernel, args.device, small=not on_card) for kernel in tested)
    report["checks"] = list(chain.from_iterable(checks))
    if on_card and not args.checks_only:
        report["ceilings"] = ceilings()
        report["speed"] = list(chain.from_iterable(map(time_all, tested)))
    path = args.json or Path(os.environ.get("OUT", ".")) / "cuda_kernels.json"
    path.write_text(json.dumps(report, indent=1))
    print_report(report)
    return int(any(not r["ok"] for r in report["checks"]))


if __name__ == "__main__":
    sys.exit(main())
