"""`TrainableMLA` in the engine: a hand-written model, one latent cache, one `wkv_b`."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import vllm_graft
from tests.serve.test_exactness import count_equal
from tests.support import adapter, engine, generate, live_module, prompts, sampled_logprobs
from vllm_graft import MLAConfig, TrainableMLA, VLLMModelForCausalLM

pytestmark = pytest.mark.engine

ARCH = "HandWrittenMLA"
LENGTHS = (1, 2, 15, 16, 17, 31, 100, 130, 200)
REAL = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 24}
SMALL = {"kv_lora_rank": 48, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 40}


class Block(nn.Module):
    def __init__(self, c) -> None:
        super().__init__()
        names = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
        sizes = {name: getattr(c, name) for name in names}
        self.norm, self.mlp_norm = nn.RMSNorm(c.hidden_size), nn.RMSNorm(c.hidden_size)
        config = MLAConfig(c.hidden_size, c.num_attention_heads, c.q_rank, **sizes)
        self.attention = TrainableMLA(config)
        self.up = nn.Linear(c.hidden_size, c.intermediate_size)
        self.down = nn.Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x, table):
        x = x + self.attention(self.norm(x), table)
        return x + self.down(nn.functional.silu(self.up(self.mlp_norm(x))))


class HandWritten(VLLMModelForCausalLM):
    def __init__(self, vllm_config, parallel_context=None) -> None:
        super().__init__()
        c = vllm_config.hf_config
        self.embed = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        rope = c.qk_rope_head_dim
        angles = torch.outer(torch.arange(512.0), 1e4 ** -(torch.arange(0, rope, 2) / rope))
        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(angles), angles))

    def get_input_embeddings(self, input_ids):
        return self.embed(input_ids)

    def forward(self, input_ids, positions=None, **kwargs):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, self.freqs_cis[: x.shape[-2]])
        return x

    def compute_logits(self, hidden_states, sampling_metadata=None):
        return self.head(hidden_states)

    def load_weights(self, weights_iter):
        parameters = dict(self.named_parameters())
        for name, tensor in weights_iter:
            parameters[name].data.copy_(tensor)


def checkpoint(folder, sizes, q_rank=0, **overrides):
    """Random weights and a config of a model type that vLLM does not take for MLA."""
    config = {
        "architectures": [ARCH], "model_type": "qwen3", "vocab_size": 128, "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "max_position_embeddings": 512, "q_rank": q_rank,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | sizes | overrides))
    from types import SimpleNamespace

    torch.manual_seed(0)
    model = HandWritten(SimpleNamespace(hf_config=SimpleNamespace(**(config | sizes))))
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.15)
    save_file(dict(model.named_parameters()), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("q_rank", [0, 24])
@pytest.mark.parametrize("sizes", [REAL, SMALL], ids=["512+64", "48+16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_sampled_token_is_equal(sizes, dtype, q_rank, tmp_path):
    vllm_graft.register(ARCH, HandWritten)
    with engine(
        checkpoint(tmp_path, sizes, q_rank), dtype=dtype, enable_prefix_caching=True,
        max_num_batched_tokens=96, enable_chunked_prefill=True,
    ) as llm:  # fmt: skip
        module, tokens = live_module(llm), prompts(LENGTHS, vocab_size=128)
        sampling = {"temperature": 1.0, "max_tokens": 20}
        together = generate(llm, tokens, **sampling)
        assert count_equal(module, tokens, together) == (180, 180)
        cached = [generate(llm, [prompt], **sampling)[0] for prompt in tokens]
        assert count_equal(module, tokens, cached) == (180, 180)
