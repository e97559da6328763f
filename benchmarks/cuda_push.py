"""`push_weights` from a trainer on a card into an engine of its own process on the same card.

    PYTHONPATH=. VLLM_BATCH_INVARIANT=1 python benchmarks/cuda_push.py --json push.json

Through memory of the card (CUDA IPC) and through the host's shared memory, in turns, each round
with other weights. After each push the engine generates, and the trainer computes the
log-probabilities of its tokens, by the kernel with which the engine reports them: counted are
those that are equal. Without a card it runs on CPU, through the host's memory.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # an engine core of its own
os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # CUDA is in use here before

import torch

from vllm_graft import make_exact
from vllm_graft.serve._vllm_sampling import logprobs_kernel
from vllm_graft.train import push
from vllm_graft.train.logprobs import token_logprobs
from vllm_graft.train.segment_cuda import CardSegment

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WAYS = ("card", "host") if DEVICE == "cuda" else ("host",)
ARCH = "Qwen3TorchTitan"
LENGTHS = (5, 64, 130)


def engine(checkpoint: str) -> Any:
    """A `vllm.LLM` that takes weights."""
    from vllm import LLM

    import vllm_graft
    from vllm_graft.serve.registry import BUILT_IN

    vllm_graft.register(ARCH, BUILT_IN[ARCH])
    return LLM(
        checkpoint, hf_overrides={"architectures": [ARCH]}, dtype="bfloat16", max_model_len=512,
        skip_tokenizer_init=True, enforce_eager=True, kv_cache_memory_bytes=1 << 30,
        gpu_memory_utilization=0.4, weight_transfer_config={"backend": "graft_shm"},
    )  # fmt: skip


def trainer(checkpoint: str) -> Any:
    """The same model in this process, with weights of its own."""
    from transformers import AutoConfig

    from examples.custom_models.qwen3_torchtitan import build_qwen3_torchtitan

    config = SimpleNamespace(
        hf_config=AutoConfig.from_pretrained(checkpoint),
        model_config=SimpleNamespace(max_model_len=512, dtype=torch.bfloat16),
    )
    # Built where it will run, as the engine's: cosines of a RoPE table differ between devices.
    with torch.device(DEVICE):
        model: Any = build_qwen3_torchtitan(config, None)
    make_exact(model)
    return model


@contextmanager
def through(way: str) -> Iterator[None]:
    """Push that way, and raise if another one was taken."""
    taken: list[type] = []
    stock = push._segment

    def segment(size: int, device: torch.device, said: dict[str, Any]) -> Any:
        made = stock(size, device, said if way == "card" else {**said, "cards": []})
        taken.append(type(made))
        return made

    with mock.patch.object(push, "_segment", segment):
        yield
    if [kind is CardSegment for kind in taken] != [way == "card"]:
        raise RuntimeError(f"{way} was asked for, taken was {taken}")


def equal(llm: Any, model: Any) -> tuple[int, int]:
    """How many of the engine's log-probabilities are the trainer's bits, of how many."""
    from vllm import SamplingParams

    generator = torch.Generator().manual_seed(0)
    vocab_size = llm.model_config.get_vocab_size()
    prompts = [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]
    sampling = SamplingParams(max_tokens=40, ignore_eos=True, logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    made = [list(output.outputs[0].token_ids) for output in outputs]
    served = [
        step[token].logprob
        for output, tokens in zip(outputs, made, strict=True)
        for step, token in zip(output.outputs[0].logprobs, tokens, strict=True)
    ]
    ours = scored(llm, model, prompts, made)
    return sum(a == b for a, b in zip(served, ours, strict=True)), len(served)


@torch.no_grad()
def scored(llm: Any, model: Any, prompts: list[list[int]], made: list[list[int]]) -> list[float]:
    """The trainer's log-probabilities of the tokens after each prompt, in one packed forward."""
    found = token_logprobs(
        lambda tokens, positions: model(tokens),
        model.compute_logits,
        [prompt + tokens for prompt, tokens in zip(prompts, made, strict=True)],
        [len(prompt) for prompt in prompts],
        vocab_size=llm.model_config.get_vocab_size(),
        device=torch.device(DEVICE),
        kernel=logprobs_kernel(llm.llm_engine.vllm_config),
    )
    values: list[float] = torch.cat(found).tolist()
    return values


def main() -> None:
    """Push in turns, and print a table last."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="0.5b", help="of vllm_graft.bench.shapes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the results here")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        from vllm_graft.bench.shapes import write_in_child

        write_in_child(chosen.shape, Path(folder))
        found = measured(engine(folder), trainer(folder), chosen.rounds)
    if chosen.json:
        chosen.json.write_text(json.dumps(found))
    for way, result in found.items():
        print(way, json.dumps(result))


def measured(llm: Any, model: Any, rounds: int) -> dict[str, Any]:
    """Seconds of each push, and equal log-probabilities after it, by way."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    counts = {way: [0, 0] for way in WAYS}
    for _ in range(rounds + 1):  # the first is a warm-up
        for way in WAYS:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.01)
            start = time.perf_counter()
            with through(way):
                push.push_weights(model, llm)
            seconds[way].append(time.perf_counter() - start)
            counts[way] = [a + b for a, b in zip(counts[way], equal(llm, model), strict=True)]
    return {
        way: {
            "device": DEVICE,
            "weights, GB": round(size / 1e9, 3),
            "seconds": round(median(times[1:]), 3),
            "equal log-probs": counts[way],
        }
        for way, times in seconds.items()
    }


if __name__ == "__main__":
    main()
