"""The Custom Model API's Quick Start, in this process and in spawned workers."""

from __future__ import annotations

import pytest

from tests.serve.conftest import LIBRARY, greedy
from tests.support import engine, generate, live_module, prompts, python

pytestmark = pytest.mark.engine


@pytest.fixture
def registered(my_library):
    import quick_start
    from vllm.model_executor.models import ModelRegistry

    ModelRegistry.register_model("MyCustomModel", quick_start.build_my_custom_model)


def test_it_gives_the_originals_tokens_far_beyond_the_sliced_table(
    registered, my_model, my_checkpoint
):
    """The model takes [B, L], slices its RoPE table by L and knows no positions."""
    tokens = prompts((1, 4, 60, 200, 300), vocab_size=256)
    want = [greedy(my_model, prompt, 20) for prompt in tokens]
    with engine(my_checkpoint, dtype="float32") as llm:
        got = [list(c.token_ids) for c in generate(llm, tokens, max_tokens=20)]
        assert got == want
        # Dropout never reaches serving, and the flag is given back.
        live_module(llm).train()
        assert [list(c.token_ids) for c in generate(llm, tokens, max_tokens=20)] == want
        assert live_module(llm).model.layers[0].dropout.training


def test_tables_are_right_under_a_bf16_engine(registered, my_model, my_checkpoint):
    """vLLM builds with bf16 as the default dtype, in which the table would be garbage."""
    import torch

    with engine(my_checkpoint, dtype="bfloat16") as llm:
        model = live_module(llm).model
        assert torch.equal(model.freqs_cis, my_model.freqs_cis)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


SPAWNED = """
import sys
sys.path.append(sys.argv[1])
if __name__ == "__main__":
    import quick_start
    from vllm import LLM, SamplingParams
    llm = LLM(sys.argv[2], dtype="float32", max_model_len=256, skip_tokenizer_init=True,
              enforce_eager=True)
    sampling = SamplingParams(temperature=0.0, max_tokens=8, detokenize=False, ignore_eos=True)
    out = llm.generate([{"prompt_token_ids": [1, 2, 3]}], sampling)
    print("TOKENS", list(out[0].outputs[0].token_ids))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting", [{}, {"VLLM_PLUGINS": "none_of_ours", "VLLM_TARGET_DEVICE": "cpu"}]
)
def test_it_works_with_spawned_processes(my_model, my_checkpoint, setting):
    done = python(
        SPAWNED, str(LIBRARY), str(my_checkpoint), VLLM_ENABLE_V1_MULTIPROCESSING="1", **setting
    )
    assert f"TOKENS {greedy(my_model, [1, 2, 3], 8)}" in done.stdout, done.stderr[-3000:]
