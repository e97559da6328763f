"""Quantization on load, registered with vLLM, of external models and of vLLM's own."""

from __future__ import annotations

import pytest
import torch

import vllm_graft
from examples.custom_models.qwen3_torchtitan import ARCH, build_qwen3_torchtitan
from tests.quantized import NAME, Int8Linear
from tests.support import (
    adapter,
    engine,
    generate,
    live_module,
    prompts,
    qwen3_checkpoint,
    sampled_logprobs,
)
from vllm_graft.serve.linears import converted

pytestmark = pytest.mark.engine

# vLLM's int8 kernel takes no float32 activations where the processor has AMX.
DTYPE = torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32

TOKENS = prompts((1, 5, 17, 64))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    vllm_graft.register(ARCH, build_qwen3_torchtitan)
    return qwen3_checkpoint(tmp_path_factory.mktemp("quantized"))


def said(llm) -> tuple[list[list[int]], list[float]]:
    completions = generate(llm, TOKENS, max_tokens=32)
    tokens = [list(c.token_ids) for c in completions]
    return tokens, [x for c in completions for x in sampled_logprobs(c)]


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
    assert mine[1] != pytest.approx(exact[1], abs=1e-3)
    if DTYPE is not torch.float32:
        pytest.skip("in bf16 the two models' norms and RoPE round differently: greedy tokens part")
    # This kernel holds the int8 weight in its own layout and drops the parameter.
    assert not weights
    assert mine[0] == stock[0]
    # The same int8 products; norms, RoPE and attention in fp32 add in another order, which may
    # move an activation across a rounding border.
    assert mine[1] == pytest.approx(stock[1], abs=1e-2)
