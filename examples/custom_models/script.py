"""The command line of the examples: serve a checkpoint in this process, print completions."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import vllm_graft


def run(arch: str, factory: Callable[..., Any], description: str) -> None:
    """Serve `CHECKPOINT` as `arch` and print a completion for each `--prompt`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("checkpoint", help="folder with config.json, safetensors and tokenizer")
    parser.add_argument("--prompt", action="append", required=True, help="may be repeated")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16 or auto (default)")
    arguments = parser.parse_args()

    from vllm import LLM, SamplingParams

    vllm_graft.register(arch, factory)
    llm = LLM(
        arguments.checkpoint,
        hf_overrides={"architectures": [arch]},
        dtype=arguments.dtype,
        enforce_eager=True,
    )
    greedy = SamplingParams(temperature=0.0, max_tokens=arguments.max_tokens)
    for output in llm.generate(arguments.prompt, greedy):
        print(f"{output.prompt}{output.outputs[0].text}")
