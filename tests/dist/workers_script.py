"""Greedy tokens of prompts by vLLM's own worker processes: `workers_script.py CHECKPOINT ARCH PROMPTS OPTIONS`.

ARCH is one that Graft knows or `stock`; PROMPTS and OPTIONS (of `LLM`) are JSON.
"""

from __future__ import annotations

import json
import sys

import vllm_graft
from tests.support import generate
from vllm_graft.serve.registry import BUILT_IN


def main() -> None:
    """Print the tokens after `TOKENS`."""
    checkpoint, arch, prompts, options = sys.argv[1:]
    overrides = {}
    if arch != "stock":
        vllm_graft.register(arch, BUILT_IN.get(arch, arch))
        overrides = {"hf_overrides": {"architectures": [arch]}}
    from vllm import LLM

    options = {"dtype": "float32", **overrides, **json.loads(options)}
    llm = LLM(
        checkpoint, max_model_len=512, skip_tokenizer_init=True, disable_log_stats=True, **options
    )
    made = generate(llm, json.loads(prompts), max_tokens=16)
    print("TOKENS", json.dumps([list(c.token_ids) for c in made]), flush=True)


if __name__ == "__main__":
    main()
