"""The sampler of model runner V2, run on CPU by Triton's interpreter."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.support import python

_COMPARE = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import triton, triton.language
import vllm.triton_utils as stand_in
stand_in.triton, stand_in.tl = triton, triton.language
import vllm.v1.worker.cpu.shm  # host memory in place of a card's
import torch
from types import SimpleNamespace
from vllm import SamplingParams
from vllm_graft.serve._vllm_sampling import (
    SampledRow, cut_alike_in_any_batch, logits_processor, processed_logits
)

everything = dict(
    temperature=0.8, top_k=40, top_p=0.95, min_p=0.001, presence_penalty=0.1,
    frequency_penalty=0.2, repetition_penalty=1.1, logit_bias={3: 2.0, 7: -1.5},
)
chosen = [everything, {}, *({name: value} for name, value in everything.items())]
chosen.append({"temperature": 0.0, "repetition_penalty": 1.3})
rows = [
    SampledRow(SamplingParams(**options), [1, 2, 3 + i, 50], [7] * i + [2])
    for i, options in enumerate(chosen)
]
rows.append(SampledRow(SamplingParams(), [4], []))
logits = torch.randn(len(rows), 97, generator=torch.Generator().manual_seed(0))
before = logits.clone()
config = SimpleNamespace(use_v2_model_runner=True, reasoning_config=None)
ours = logits_processor(config)(logits.requires_grad_(), rows)
assert not ours.requires_grad and ours.dtype == torch.float32 and torch.equal(logits, before)
torch.testing.assert_close(ours, processed_logits(logits, rows), rtol=1e-5, atol=1e-6)
narrow = logits.detach()[-1:].bfloat16()
assert torch.equal(logits_processor(config)(narrow, rows[-1:]), narrow.float())
assert logits_processor(SimpleNamespace(use_v2_model_runner=False)) is processed_logits
print("equal", len(rows))

from vllm.v1.sample.ops import topk_topp_triton as ops
assert ops._SPLIT_MAX_BATCH > 1
for mode, two_kernels in (("raw_logprobs", True), ("processed_logprobs", False)):
    config.model_config = SimpleNamespace(logprobs_mode=mode)
    cut_alike_in_any_batch(config)
    assert (ops._SPLIT_MAX_BATCH > 0) == two_kernels
print("cut alike", open(ops.__file__).read().count("batch_size <= _SPLIT_MAX_BATCH"))
"""


@pytest.mark.skipif(
    find_spec("triton") is None or find_spec("vllm.v1.worker.cpu.shm") is None,
    reason="this release does not run model runner V2 on CPU",
)
def test_runner_v2_processes_logits_as_the_other_sampler_does():
    """A row for each parameter, one for all of them, one greedy, one without a token before it."""
    result = python(_COMPARE)
    assert "equal 12" in result.stdout, result.stderr
    # A warm-up, what it compiles, and the choice itself.
    assert "cut alike 3" in result.stdout, result.stderr
