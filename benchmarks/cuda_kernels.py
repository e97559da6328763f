"""Check and time the attention kernels of training and serving on one card.

    PYTHONPATH=. python benchmarks/cuda_kernels.py

Needs torch and the torch part of vllm_graft, no vLLM (`--kernel vllm` runs
vLLM's op instead of PyTorch's, where vLLM is installed). Correctness first:
forward and gradients against float64, and decode from a paged cache against
packed prefill, bit for bit. Then speed and memory, against ceilings measured
on the same card. A short table comes last, all figures go to a JSON file, and
the exit code is 1 when a check fails. `--device cpu` runs small sizes through
`sdpa_packed`, which promises no bit equality, and times nothing.

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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from vllm_graft.attention.cuda import varlen, varlen_packed, varlen_parameters, window_of
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
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One attention layer."""

    name: str
    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    window: int | None = None
    causal: bool = True

    @property
    def spec(self) -> AttentionSpec:
        """What the kernels need beside the tensors."""
        scale = self.qk_dim**-0.5
        return AttentionSpec(scale=scale, causal=self.causal, sliding_window=self.window)

    def flop(self, lengths: list[int], *, backward: bool = False) -> float:
        """Floating-point operations that causal attention needs: no padding, no masked half.

        Two products forward; five backward (scores again, dP, dQ, dK, dV).
        """
        pairs = self.heads * sum(n * (n + 1) / 2 for n in lengths)
        widths = 3 * self.qk_dim + 2 * self.v_dim if backward else self.qk_dim + self.v_dim
        return 2 * pairs * widths


def shapes(*, small: bool) -> list[Shape]:
    """Layers of Qwen3-8B (GQA) and DeepSeek V3 (MLA, expanded), with MHA and MQA beside them."""
    if small:
        gqa = Shape(name="GQA", heads=4, kv_heads=2, qk_dim=32, v_dim=32)
        mla = Shape(name="MLA", heads=4, kv_heads=4, qk_dim=24, v_dim=16)
    else:
        gqa = Shape(name="GQA", heads=32, kv_heads=8, qk_dim=128, v_dim=128)
        mla = Shape(name="MLA", heads=128, kv_heads=128, qk_dim=192, v_dim=128)
    mha, mqa = replace(gqa, name="MHA", kv_heads=gqa.heads), replace(gqa, name="MQA", kv_heads=1)
    return [mha, gqa, mqa, mla]


def variants(base: list[Shape]) -> list[Shape]:
    """The same layers, and the masks that are checked but not timed."""
    gqa = base[1]
    return [
        *base,
        replace(gqa, name="GQA window 100", window=100),
        replace(gqa, name="GQA bidirectional", causal=False),
    ]


# --- data -------------------------------------------------------------------------------


def borders_of(lengths: list[int]) -> torch.Tensor:
    """Borders `[B + 1]` int32 on CPU."""
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)


def random_qkv(
    shape: Shape, tokens: int, device: str, dtype: torch.dtype = torch.bfloat16
) -> Tensors:
    """Normal q, k, v of `tokens` tokens."""
    make = partial(torch.randn, device=device, dtype=dtype)
    return (
        make(tokens, shape.heads, shape.qk_dim),
        make(tokens, shape.kv_heads, shape.qk_dim),
        make(tokens, shape.kv_heads, shape.v_dim),
    )


def poison(like: torch.Tensor) -> None:
    """Leave NaN in freed blocks of several sizes, for the next outputs to land on."""
    blocks = [torch.full_like(like, torch.nan) for _ in range(4)]
    del blocks


@dataclass(frozen=True, kw_only=True)
class Pages:
    """A paged cache with its pages in random order; slots without a token hold NaN."""

    k: torch.Tensor
    """`[pages, page size, K, H]`; v: the same with its own head dim."""
    v: torch.Tensor
    table: torch.Tensor
    """`[B, M]` int32 on CPU: the pages of every sample."""

    @classmethod
    def of(
        cls, k: torch.Tensor, v: torch.Tensor, lengths: list[int], page_size: int, fill: float
    ) -> Pages:
        """Store packed `k` and `v` (`[T, K, H]`)."""
        most = -(-max(lengths) // page_size)
        table = torch.randperm(len(lengths) * most).view(len(lengths), most).to(torch.int32)
        slots = cls._slots(table, lengths, page_size).to(k.device)
        pools = []
        for x in (k, v):
            pool = x.new_full((table.numel() * page_size, *x.shape[1:]), fill)
            pool[slots] = x
            pools.append(pool.view(table.numel(), page_size, *x.shape[1:]))
        return cls(k=pools[0], v=pools[1], table=table)

    @staticmethod
    def _slots(table: torch.Tensor, lengths: list[int], page_size: int) -> torch.Tensor:
        rows = table.long()[:, :, None] * page_size + torch.arange(page_size)
        return torch.cat([row.flatten()[:n] for row, n in zip(rows, lengths, strict=True)])

    def gather(self, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed k and v of the first `lengths` tokens of every sample."""
        slots = self._slots(self.table[: len(lengths)], lengths, self.k.shape[1]).to(self.k.device)
        return self.k.flatten(0, 1)[slots], self.v.flatten(0, 1)[slots]


# --- the kernels under test ---------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A training forward and the serving forward that should equal it."""

    name: str
    page_size: int
    exact: bool
    """Whether it promises bit equality."""
    fill: float
    """What empty cache slots hold."""
    train: Callable[..., torch.Tensor]
    """`(q, k, v, borders, spec)` of packed samples, differentiable."""
    serve: Callable[[torch.Tensor, Pages, list[int], list[int], AttentionSpec], torch.Tensor]
    """`(q, pages, new, total, spec)`: the last `new` of `total` cached tokens are queries."""
    takes: Callable[[Shape], bool] = lambda shape: True


def serve_sdpa(
    q: torch.Tensor, pages: Pages, new: list[int], total: list[int], spec: AttentionSpec
) -> torch.Tensor:
    """Serve by scaled dot-product attention, one sample at a time."""
    k, v = pages.gather(total)
    parts = zip(q.split(new), k.split(total), v.split(total), strict=True)
    outputs = []
    for one_q, one_k, one_v in parts:
        padded = F.pad(one_q, (0, 0, 0, 0, one_k.shape[0] - one_q.shape[0], 0))
        whole = sdpa_packed(padded, one_k, one_v, borders_of([one_k.shape[0]]), spec)
        outputs.append(whole[-one_q.shape[0] :])
    return torch.cat(outputs)


def serve_varlen(
    q: torch.Tensor, pages: Pages, new: list[int], total: list[int], spec: AttentionSpec
) -> torch.Tensor:
    """Serve by `varlen_attn`: over the block table where it has one, else gathered pages."""
    cu_q, longest = borders_of(new).to(q.device), max(total)
    if "block_table" not in varlen_parameters():
        k, v = pages.gather(total)
        cu_k = borders_of(total).to(q.device)
        return varlen(q, k, v, cu_q, cu_k, max(new), longest, spec)
    table = pages.table[: len(total)].to(q.device)
    capacity = table.shape[1] * pages.k.shape[1]
    cu_k = torch.arange(len(total) + 1, dtype=torch.int32, device=q.device) * capacity
    used = torch.tensor(total, dtype=torch.int32, device=q.device)
    return varlen(
        q, pages.k, pages.v, cu_q, cu_k, max(new), capacity, spec, block_table=table, seqused_k=used
    )


def serve_vllm(
    q: torch.Tensor, pages: Pages, new: list[int], total: list[int], spec: AttentionSpec
) -> torch.Tensor:
    """Serve by the op of vLLM."""
    from vllm_graft.serve._vllm_cuda import flash_over_pages

    return flash_over_pages(
        q,
        pages.k,
        pages.v,
        pages.table[: len(total)],
        torch.tensor(total, dtype=torch.int32),
        borders_of(new),
        spec.scale,
        window_of(spec),
        causal=spec.causal,
    )


def kernels() -> dict[str, Kernel]:
    """Everything that `--kernel` knows. Garbage in a cache of vLLM is finite, so its fill is 0."""
    return {
        "sdpa": Kernel(
            name="sdpa",
            page_size=16,
            exact=False,
            fill=torch.nan,
            train=attend,
            serve=serve_sdpa,
        ),
        "torch": Kernel(
            name="torch varlen_attn",
            page_size=256,  # what FlashAttention 2 asks of a paged cache
            exact=True,
            fill=torch.nan,
            train=varlen_packed,
            serve=serve_varlen,
        ),
        "vllm": Kernel(
            name="vllm flash_attn_varlen_func",
            page_size=16,
            exact=True,
            fill=0.0,
            train=attend,
            serve=serve_vllm,
            takes=lambda shape: shape.qk_dim == shape.v_dim,
        ),
    }


# --- correctness ----------------------------------------------------------------------------


def relative_errors(out: torch.Tensor, ref: torch.Tensor, lengths: list[int]) -> float:
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
    grad_out: torch.Tensor,
    borders: torch.Tensor,
    spec: AttentionSpec,
) -> list[torch.Tensor]:
    """`[out, dq, dk, dv]`."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attention(*leaves, borders, spec)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


def check_float64(
    kernel: Kernel, shape: Shape, device: str, lengths: list[int], dtype: torch.dtype
) -> list[Record]:
    """Forward and gradients of packed odd samples against `sdpa_packed` in float64."""
    borders = borders_of(lengths)
    inputs = random_qkv(shape, sum(lengths), device, dtype)
    grad_out = torch.randn(sum(lengths), shape.heads, shape.v_dim, device=device, dtype=dtype)
    poison(inputs[0])
    got = forward_and_gradients(kernel.train, inputs, grad_out, borders, shape.spec)
    exact: Tensors = tuple(x.double() for x in inputs)  # type: ignore[assignment]
    want = forward_and_gradients(sdpa_packed, exact, grad_out.double(), borders, shape.spec)
    limits = [FORWARD_LIMIT, *[GRADIENT_LIMIT] * 3]
    if dtype == torch.float32:
        limits = [FLOAT32_LIMIT] * 4
    title = str(dtype).removeprefix("torch.")
    return [
        record(f"{name} vs float64, {title}", shape, relative_errors(a, b, lengths), limit)
        for name, a, b, limit in zip(("out", "dq", "dk", "dv"), got, want, limits, strict=True)
    ]


def record(check: str, shape: Shape, value: float, limit: float) -> Record:
    """One result; `value` must not exceed `limit`, and NaN fails."""
    return {
        "check": check,
        "shape": shape.name,
        "value": value,
        "limit": limit,
        "ok": value <= limit,
    }


def check_decode(kernel: Kernel, shape: Shape, device: str, lengths: list[int]) -> list[Record]:
    """Serving against the packed training forward: elements that differ, of all tokens.

    Three ways to serve: token by token from the paged cache with all samples in
    one batch, chunks of `CHUNK` tokens, and every sample alone in one piece.
    A kernel without the promise is held to `FORWARD_LIMIT` instead.
    """
    borders = borders_of(lengths)
    q, k, v = random_qkv(shape, sum(lengths), device)
    pages = Pages.of(k, v, lengths, kernel.page_size, kernel.fill)
    poison(q)
    with torch.no_grad():
        trained = kernel.train(q, k, v, borders, shape.spec)
        served = {
            "decode": serve_in_steps(kernel, shape, q, pages, lengths, step=1),
            "chunked prefill": serve_in_steps(kernel, shape, q, pages, lengths, step=CHUNK),
            "alone": serve_alone(kernel, shape, (q, k, v), lengths),
        }
    results = []
    for name, out in served.items():
        if kernel.exact:
            differ = int((out != trained).sum())
            results.append(record(f"{name} vs packed, elements that differ", shape, differ, 0))
        else:
            error = relative_errors(out, trained.double(), lengths)
            # Both sides are rounded, so both may be off.
            results.append(record(f"{name} vs packed, error", shape, error, 2 * FORWARD_LIMIT))
    return results


def serve_in_steps(
    kernel: Kernel, shape: Shape, q: torch.Tensor, pages: Pages, lengths: list[int], step: int
) -> torch.Tensor:
    """Serve the samples together, `step` more tokens of each at a time; `[T, N, Hv]`.

    Samples that have ended stay in the batch and repeat their last token, as
    the order of the block table is fixed; the repeats must agree as well.
    """
    starts = borders_of(lengths)[:-1].tolist()
    out = q.new_full((*q.shape[:2], shape.v_dim), torch.nan)
    for done in range(0, max(lengths), step):
        total = [min(done + step, n) for n in lengths]
        new = [max(t - done, 1) for t in total]
        rows = torch.cat(
            [torch.arange(s + t - m, s + t) for s, t, m in zip(starts, total, new, strict=True)]
        ).to(q.device)
        out[rows] = kernel.serve(q[rows], pages, new, total, shape.spec)
    return out


def serve_alone(kernel: Kernel, shape: Shape, inputs: Tensors, lengths: list[int]) -> torch.Tensor:
    """Every sample as a batch of its own, through the training forward."""
    parts = zip(*(x.split(lengths) for x in inputs), strict=True)
    outputs = [
        kernel.train(*part, borders_of([n]), shape.spec)
        for part, n in zip(parts, lengths, strict=True)
    ]
    return torch.cat(outputs)


def check_all(kernel: Kernel, device: str, *, small: bool) -> list[Record]:
    """Every check of every shape."""
    lengths = [1, 5, 17, 33] if small else list(ODD_LENGTHS)
    results: list[Record] = []
    for shape in filter(kernel.takes, variants(shapes(small=small))):
        results += check_float64(kernel, shape, device, lengths, torch.bfloat16)
        if shape.causal:
            results += check_decode(kernel, shape, device, lengths)
    plain = replace(kernel, train=attend)  # the dispatch that models call
    results += check_float64(plain, shapes(small=small)[1], device, lengths, torch.float32)
    return results


# --- speed and memory -----------------------------------------------------------------------


def median_ms(work: Callable[[], object], repeats: int = 15, warm_up: int = 4) -> float:
    """Median milliseconds of `work` on the device, by CUDA events."""
    times = []
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
    result: Record = {"work": title, "shape": shape.name, "tokens": sum(lengths)}
    for name, attention in (("kernel", kernel.train), ("sdpa", sdpa_packed)):
        forward = partial(attention, *inputs, borders_of(lengths), shape.spec)
        both = partial(
            forward_and_gradients, attention, inputs, grad_out, borders_of(lengths), shape.spec
        )
        try:
            figures = time_one(shape, lengths, forward, both)
        except torch.OutOfMemoryError:
            figures = {"out_of_memory": True}
        result |= {f"{name}_{figure}": value for figure, value in figures.items()}
    return result


def time_one(
    shape: Shape,
    lengths: list[int],
    forward: Callable[[], torch.Tensor],
    both: Callable[[], list[torch.Tensor]],
) -> Record:
    """Milliseconds, TFLOP/s, peak memory, and whether two backward passes give the same bits."""
    with torch.no_grad():
        forward_ms = median_ms(forward)
    both_ms = median_ms(both)
    first, second = both(), both()
    repeat = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    del first, second
    return {
        "forward_ms": forward_ms,
        "both_ms": both_ms,
        "forward_tflops": shape.flop(lengths) / forward_ms / 1e9,
        "backward_tflops": shape.flop(lengths, backward=True) / (both_ms - forward_ms) / 1e9,
        "both_peak_mib": peak_mib(both),
        "repeats": repeat,
    }


def time_decode(kernel: Kernel, shape: Shape, batch: int, context: int) -> Record:
    """One token for each of `batch` samples; GB/s counts every cached key and value once."""
    total = [context] * batch
    _, k, v = random_qkv(shape, context * batch, "cuda")
    q = torch.randn(batch, shape.heads, shape.qk_dim, device="cuda", dtype=torch.bfloat16)
    pages = Pages.of(k, v, total, kernel.page_size, kernel.fill)
    num_bytes = (k.numel() + v.numel()) * k.element_size()
    result: Record = {"work": f"decode {batch} x {context}", "shape": shape.name}
    with torch.no_grad():
        ms = median_ms(lambda: kernel.serve(q, pages, [1] * batch, total, shape.spec))
        result |= {"paged_ms": ms, "paged_gbs": num_bytes / ms / 1e6}
        if kernel.train is varlen_packed:
            for name, max_q in (("fixed split", 2), ("free split", 1)):
                ms = median_ms(contiguous_decode(q, k, v, total, shape.spec, max_q))
                result |= {f"{name}_ms": ms, f"{name}_gbs": num_bytes / ms / 1e6}
    return result


def contiguous_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    total: list[int],
    spec: AttentionSpec,
    max_q: int,
) -> Callable[[], object]:
    """The kernel alone on a packed cache. `max_q=1` lets FlashAttention 2 choose its splits."""
    from torch.nn.attention.varlen import varlen_attn

    cu_q, cu_k = (borders_of(x).to(q.device) for x in ([1] * len(total), total))
    v = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
    options: dict[str, Any] = {"scale": spec.scale, "window_size": window_of(spec)}
    if "enable_gqa" in varlen_parameters():
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    if "num_splits" in varlen_parameters() and max_q > 1:
        options["num_splits"] = 1
    return partial(varlen_attn, q, k, v, cu_q, cu_k, max_q, max(total), **options)


def time_all(kernel: Kernel) -> list[Record]:
    """Speed and memory of every shape."""
    results = []
    for shape in filter(kernel.takes, shapes(small=False)):
        results.append(time_training(kernel, shape, [8192], "one sample of 8192"))
        packed = [1023 + 2 * n for n in range(8)]
        results.append(time_training(kernel, shape, packed, "8 samples of about 1030"))
        batch, context = (16, 4097) if shape.heads > 64 else (64, 4097)
        results.append(time_decode(kernel, shape, batch, context))
        torch.cuda.empty_cache()
    return results


# --- report ---------------------------------------------------------------------------------


def machine(device: str) -> dict[str, str]:
    """Versions, card and driver."""
    facts = {"torch": torch.__version__, "python": sys.version.split()[0], "device": device}
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False)  # noqa: S603
        facts |= {
            "card": torch.cuda.get_device_name(),
            "driver": driver.stdout.strip(),
            "cuda": str(torch.version.cuda),
        }
    return facts


def print_report(report: Record) -> None:
    """The table, a line per shape and figure."""
    print("\n" + ", ".join(f"{k} {v}" for k, v in report["machine"].items()))
    print(f"kernel: {report['kernel']}")
    for shape in dict.fromkeys(r["shape"] for r in report["checks"]):
        mine = [r for r in report["checks"] if r["shape"] == shape]
        for r in mine:
            mark = "ok  " if r["ok"] else "FAIL"
            print(f"{mark} {shape:18} {r['check']:46} {r['value']:<10.4g} <= {r['limit']:.4g}")
    if "ceilings" in report:
        top = report["ceilings"]
        print(f"ceilings: {top['matmul_tflops']:.0f} TFLOP/s, {top['copy_gbs']:.0f} GB/s")
    for r in report.get("speed", []):
        figures = [f"{k} {v:.4g}" for k, v in r.items() if isinstance(v, float)]
        extra = [f"{k} {v}" for k, v in r.items() if isinstance(v, bool)]
        print(f"{r['shape']:4} {r['work']:24} " + ", ".join(figures + extra))
    failed = sum(not r["ok"] for r in report["checks"])
    print(f"{len(report['checks'])} checks, {failed} failed")


def main(argv: list[str] | None = None) -> int:
    """Run everything; 1 when a check failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--kernel", choices=["torch", "vllm"], default="torch")
    parser.add_argument("--checks-only", action="store_true", help="time nothing")
    parser.add_argument("--seed", type=int, default=None, help="default: drawn anew")
    parser.add_argument("--json", type=Path, default=None, help="default: cuda_kernels.json")
    args = parser.parse_args(argv)
    seed = torch.seed() if args.seed is None else args.seed
    torch.manual_seed(seed)
    on_card = args.device == "cuda"
    kernel = kernels()[args.kernel if on_card else "sdpa"]
    report: Record = {"machine": machine(args.device), "kernel": kernel.name, "seed": seed}
    report["checks"] = check_all(kernel, args.device, small=not on_card)
    if on_card and not args.checks_only:
        report |= {"ceilings": ceilings(), "speed": time_all(kernel)}
    path = args.json or Path(os.environ.get("OUT", ".")) / "cuda_kernels.json"
    path.write_text(json.dumps(report, indent=1))
    print_report(report)
    return int(any(not r["ok"] for r in report["checks"]))


if __name__ == "__main__":
    sys.exit(main())
