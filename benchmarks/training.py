"""What training on the served module costs: memory and time.

    PYTHONPATH=. python benchmarks/training.py logprobs    # memory of token_logprobs, V = 150,000
    PYTHONPATH=. python benchmarks/training.py resident    # engines by packing
    PYTHONPATH=. python benchmarks/training.py step        # train step beside TorchTitan with SDPA
    PYTHONPATH=. python benchmarks/training.py watch       # looking for changed weights

Each prints JSON. Memory is read in processes of their own; times are medians of
interleaved runs in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
FACTORY = "examples.custom_models.qwen3_torchtitan:build_qwen3_torchtitan"
SERVING = {"dtype": "bfloat16", "max_model_len": 512, "enforce_eager": True}
TOKENS, VOCAB, WIDTH = 8192, 150_000, 256
LENGTHS = (32, 200, 96, 184, 128, 60, 250, 74)
"""Of the packed samples of one train step: 1,024 tokens."""
RESIDENT = ("engine-off", "trainable-off", "engine-release", "engine-keep", "trainable-keep")
"""Engines whose memory is compared, each with its `vllm_graft_packing`."""


def memory_kb(field: str) -> int:
    """A field of /proc/self/status: `VmHWM` is the peak, `RssAnon` what is held now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field)))


def in_child(*arguments: str) -> dict[str, Any]:
    """What this script prints with `arguments` in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def logprobs_memory(kind: str) -> dict[str, Any]:
    """Peak memory of a forward and backward through the vocabulary, beyond the start."""
    from vllm_graft.train import logprobs

    head = torch.nn.Linear(WIDTH, VOCAB, bias=False, dtype=torch.bfloat16)
    hidden = torch.randn(TOKENS + 1, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    sequence = torch.randint(0, VOCAB, (TOKENS + 1,)).tolist()
    before = memory_kb("VmHWM")
    if kind == "chunked":
        [scored] = logprobs.token_logprobs(
            lambda *_: hidden, head, [sequence], [1], vocab_size=VOCAB, device=torch.device("cpu")
        )
    else:
        rows = head(hidden[:-1]).log_softmax(-1, dtype=torch.float32)
        scored = rows.gather(1, torch.tensor(sequence[1:])[:, None])[:, 0]
    scored.sum().backward()
    return {"kind": kind, "peak_mb": (memory_kb("VmHWM") - before) / 1000}


def resident(kind: str, checkpoint: str) -> dict[str, Any]:
    """Anonymous memory of an engine after its first generation."""
    from vllm import LLM, SamplingParams

    import vllm_graft

    engine, packing = kind.split("-")
    options = {
        "skip_tokenizer_init": True,
        "additional_config": {"vllm_graft_packing": packing},
        **SERVING,
    }
    if engine == "trainable":
        llm = vllm_graft.TrainableLLM(checkpoint, factory=FACTORY, **options)
    else:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        vllm_graft.register("Qwen3TorchTitan", FACTORY)
        llm = LLM(checkpoint, hf_overrides={"architectures": ["Qwen3TorchTitan"]}, **options)
    params = SamplingParams(max_tokens=8, detokenize=False, ignore_eos=True)
    llm.generate([{"prompt_token_ids": list(range(1, 200))}], params, use_tqdm=False)
    return {"kind": kind, "anonymous_mb": memory_kb("RssAnon") / 1000}


def train_step(checkpoint: str, rounds: int) -> dict[str, Any]:
    """Forward and backward of the swapped model and of TorchTitan's with SDPA, same batch."""
    import vllm_graft

    llm = vllm_graft.TrainableLLM(checkpoint, factory=FACTORY, skip_tokenizer_init=True, **SERVING)
    reference = sdpa_twin(llm, checkpoint)
    tokens = torch.randint(0, 32000, (sum(LENGTHS),))
    borders = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])

    def graft() -> torch.Tensor:
        with vllm_graft.packed(borders):
            return llm.model.compute_logits(llm.model(tokens))

    def titan() -> torch.Tensor:
        h = reference.tok_embeddings(tokens[None])
        for layer in reference.layers.values():
            h = layer(h, None, positions[None])
        return reference.lm_head(reference.norm(h))[0]

    times = paired({"graft": lambda: step(graft, llm.model, tokens),
                    "torchtitan_sdpa": lambda: step(titan, reference, tokens)}, rounds)  # fmt: skip
    return {**times, "ratio": times["torchtitan_sdpa"] / times["graft"], "tokens": len(tokens)}


def sdpa_twin(llm: Any, checkpoint: str) -> Any:
    """TorchTitan's own model, only its attention call replaced, with the same weights."""
    from examples.custom_models.qwen3_torchtitan import qwen3_config

    model = qwen3_config(llm.model_config.hf_config, 512).build().to(torch.bfloat16)
    own, served = dict(model.named_parameters()), dict(llm.model.model.named_parameters())
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(served[name])
    for buffer, kept in zip(model.buffers(), llm.model.model.buffers(), strict=True):
        buffer.data = kept.clone()
    mask = torch.block_diag(*(torch.ones(n, n) for n in LENGTHS)).tril().bool()
    for layer in model.layers.values():
        layer.attention.inner_attention = Sdpa(mask)
    return model


class Sdpa(torch.nn.Module):
    """PyTorch's attention under one mask."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> torch.Tensor:
        """[B, L, N, H] to the same."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=self.mask, enable_gqa=True
        )
        return out.transpose(1, 2)


def step(logits: Callable[[], torch.Tensor], model: torch.nn.Module, tokens: torch.Tensor) -> None:
    """Forward, loss, backward."""
    torch.nn.functional.cross_entropy(logits()[:-1].float(), tokens[1:]).backward()
    model.zero_grad()


def watch(checkpoint: str, rounds: int) -> dict[str, Any]:
    """Seconds to look for changes, with and without the digest."""
    import vllm_graft

    llm = vllm_graft.TrainableLLM(checkpoint, factory=FACTORY, skip_tokenizer_init=True, **SERVING)
    look = llm.live._watch
    size = sum(p.numel() * p.element_size() for p in llm.model.parameters())
    return {
        "weights_mb": size / 1e6,
        **paired({"versions": lambda: look.changed(thorough=False),
                  "digest": lambda: look.changed(thorough=True)}, rounds),
    }  # fmt: skip


def paired(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each, run in turns after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if index:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def main() -> None:
    """Measure one thing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("logprobs", "resident", "step", "watch"))
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    parser.add_argument("--shape", default="0.5b", help="of vllm_graft.bench.shapes")
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    if chosen.kind and chosen.what == "logprobs":
        found = logprobs_memory(chosen.kind)
    elif chosen.kind:
        found = resident(chosen.kind, chosen.checkpoint)
    elif chosen.what == "logprobs":
        found = {k: in_child("logprobs", "--kind", k)["peak_mb"] for k in ("chunked", "whole")}
    else:
        found = with_checkpoint(chosen)
    print(json.dumps(found))


def with_checkpoint(chosen: Any) -> dict[str, Any]:
    """The measurements that need a model."""
    from vllm_graft.bench.shapes import write_in_child

    with tempfile.TemporaryDirectory() as folder:
        write_in_child(chosen.shape, Path(folder))
        if chosen.what == "resident":
            arguments = ("--checkpoint", folder, "--kind")
            return {
                kind: in_child("resident", *arguments, kind)["anonymous_mb"] for kind in RESIDENT
            }
        measure = train_step if chosen.what == "step" else watch
        return measure(folder, chosen.rounds)


if __name__ == "__main__":
    main()
