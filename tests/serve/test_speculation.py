"""Speculative decoding: the tokens and log-probabilities of decoding without it."""

from __future__ import annotations

import json

import pytest

from tests.support import python, qwen3_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.slow]

# A process of its own: n-gram speculation imports numba, after which vLLM 0.32 starts no further
# engine in the same process.
CODE = """
import json, sys
import vllm_graft
from examples.custom_models.qwen3_torchtitan import ARCH, build_qwen3_torchtitan
from tests.support import (
    engine, generate, live_module, prompts, sampled_logprobs, training_logprobs
)

checkpoint, dtype = sys.argv[1:]
vllm_graft.register(ARCH, build_qwen3_torchtitan)
tokens = prompts((5, 17, 64, 130)) + [[7, 8, 9, 10, 11] * 12]
draft = {"method": "draft_model", "model": checkpoint, "num_speculative_tokens": 3}
ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3,
         "prompt_lookup_min": 1}
results = {}
for name, config in {"none": None, "draft_model": draft, "ngram": ngram}.items():
    options = {} if config is None else {"speculative_config": config}
    with engine(checkpoint, ARCH, dtype=dtype, disable_log_stats=False, **options) as llm:
        completions = generate(llm, tokens)
        accepted = [metric.value for metric in llm.get_metrics()
                    if metric.name == "vllm:spec_decode_num_accepted_tokens"]
        own = [list(c.token_ids) for c in completions]
        trained = training_logprobs(live_module(llm), tokens, own)
        results[name] = {
            "tokens": own,
            "served": [sampled_logprobs(c) for c in completions],
            "trained": [row.tolist() for row in trained],
            "accepted": accepted,
        }
print(json.dumps(results))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_speculation_changes_no_token_and_no_logprob(dtype, tmp_path):
    ran = python(
        CODE, str(qwen3_checkpoint(tmp_path)), dtype,
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    results = json.loads(ran.stdout.splitlines()[-1])
    without = results.pop("none")
    for method, result in results.items():
        assert result["tokens"] == without["tokens"], method
        assert result["served"] == without["served"] == result["trained"], method
        assert sum(result["accepted"]) > 0, method
