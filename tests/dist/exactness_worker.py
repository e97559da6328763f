"""One rank, or one process with a given number of threads: `verify_exactness` on a checkpoint.

`exactness_worker.py ARCH CHECKPOINT RESULT MAX_TOKENS OPTIONS(json)`; writes counts and the log-probs of
fixed tokens to RESULT.rank.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import vllm_graft
from tests.support import prompts
from vllm_graft.serve import _vllm_engine
from vllm_graft.serve.registry import BUILT_IN


def main() -> None:
    """Run and write."""
    arch, checkpoint, result, max_tokens, options = sys.argv[1:]
    llm = vllm_graft.TrainableLLM(
        checkpoint, factory=BUILT_IN[arch], arch=arch, max_model_len=512, seed=0,
        skip_tokenizer_init=True, enable_prefix_caching=True,
        tensor_parallel_size=int(os.environ.get("WORLD_SIZE", "1")), **json.loads(options),
    )  # fmt: skip
    report = vllm_graft.verify_exactness(llm, max_tokens=int(max_tokens))
    fixed = prompts((1, 7, 64, 130, 300), llm.model_config.get_vocab_size())
    scored = [s.tolist() for s in llm.token_logprobs(fixed, [1] * len(fixed))]
    core = _vllm_engine.core_of(llm.llm_engine)
    saved = {
        "paths": [(p.name, p.equal, p.total) for p in report.paths],
        "without": [
            name
            for name, there in (
                ("prefix cache", _vllm_engine.caches_prefixes(core)),
                ("chunked prefill", _vllm_engine.chunks_prompts(core)),
            )
            if not there
        ],
        "scored": scored,
        "threads": torch.get_num_threads(),
    }
    rank = dist.get_rank() if dist.is_initialized() else 0
    Path(f"{result}.{rank}").write_text(json.dumps(saved))
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
