"""Quantization on load, registered with vLLM, of external models and of vLLM's own."""

from __future__ import annotations

import pytest
import torch
from vllm import SamplingParams

import vllm_graft
from examples.custom_models.qwen3_torchtitan import ARCH, build_qwen3_torchtitan
from tests.quantized import NAME, Int8Linear
from tests.support import (
    adapter,
    engine,
    live_module,
    prompts,
    qwen3_checkpoint,
)
from vllm_graft.serve.linears import converted

pytestmark = pytest.mark.engine

# vLLM's int8 kernel takes no float32 activations where the processor has AMX.
DTYPE = torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32

TOKENS = prompts((2, 5, 17, 64, 130))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    vllm_graft.register(ARCH, build_qwen3_torchtitan)
    return qwen3_checkpoint(tmp_path_factory.mktemp("quantized"))


def said(llm) -> list[float]:
    """Log-probabilities of given tokens: greedy ones part for good where two are nearly alike."""
    outputs = llm.generate(
        [{"prompt_token_ids": tokens} for tokens in TOKENS],
        SamplingParams(prompt_logprobs=0, max_tokens=1),
        use_tqdm=False,
    )
    return [
        entry[token].logprob
        for output in outputs
        for token, entry in zip(
            output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
        )
    ]


def test_every_layer_is_quantized_and_says_what_vllms_own_model_says(checkpoint):
    with engine(checkpoint, ARCH, dtype=DTYPE, quantization=NAME) as llm:
        layers = converted(live_module(llm))
        methods = {type(layer.quant_method) for layer in layers.values()}
        weights = [layer.weight for layer in layers.values() if layer.weight is not None]
        left = {weight.dtype for weight in weights} - {torch.int8}
        head = live_module(llm).model.lm_head.weight.dtype
        mine = said(llm)
        with pytest.raises(ValueError, match="weights cannot be changed while quantization"):
            adapter(llm).load_weights(iter([]))
    with engine(checkpoint, dtype=DTYPE, quantization=NAME) as llm:
        stock = said(llm)
    with engine(checkpoint, ARCH, dtype=DTYPE) as llm:
        exact = said(llm)
    assert len(layers) == 3 * 7
    assert (methods, left, head) == ({Int8Linear}, set(), DTYPE)
    assert len(mine) == sum(map(len, TOKENS)) - len(TOKENS)
    assert mine != pytest.approx(exact, abs=1e-3)
    if DTYPE is not torch.float32:
        pytest.skip("in bf16 the two models' norms and RoPE round differently")
    # This kernel holds the int8 weight in its own layout and drops the parameter.
    assert not weights
    # The same int8 products: a wrong one would move every token. Norms, RoPE and attention in fp32
    # add in another order, which now and then moves an activation across a rounding border, and
    # the tokens after it by less than quantization itself does.
    moved = [abs(one - other) for one, other in zip(mine, stock, strict=True)]
    assert sum(by <= 1e-5 for by in moved) > len(moved) / 2
    assert max(moved) < max(abs(one - other) for one, other in zip(mine, exact, strict=True))
