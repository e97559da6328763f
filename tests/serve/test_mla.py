"""`TrainableMLA` in the engine: a hand-written model, one latent cache, one `wkv_b`."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import vllm_graft
from tests.serve.test_exactness import count_equal
from tests.support import (
    adapter,
    engine,
    generate,
    live_module,
    prompts,
    sampled_logprobs,
    training_logprobs,
)
from vllm_graft import MLAConfig, TrainableMLA, VLLMModelForCausalLM

pytestmark = pytest.mark.engine

ARCH = "HandWrittenMLA"
LENGTHS = (1, 2, 15, 16, 17, 31, 100, 130, 200)
REAL = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 24}
DEEPSEEK = {"model_type": "deepseek_v3", "q_lora_rank": None}
"""Makes vLLM choose MLA's block size by itself, and no prefix cache or chunked prefill."""
SMALL = {"kv_lora_rank": 48, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 40}


class Block(nn.Module):
    def __init__(self, c) -> None:
        super().__init__()
        names = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
        sizes = {name: getattr(c, name) for name in names}
        self.norm, self.mlp_norm = nn.RMSNorm(c.hidden_size), nn.RMSNorm(c.hidden_size)
        config = MLAConfig(c.hidden_size, c.num_attention_heads, c.q_rank, **sizes)
        self.attention = TrainableMLA(config)
        self.act = nn.SiLU()
        self.up = nn.Linear(c.hidden_size, c.intermediate_size)
        self.down = nn.Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x, table):
        x = x + self.attention(self.norm(x), table)
        return x + self.down(self.act(self.up(self.mlp_norm(x))))


class HandWritten(VLLMModelForCausalLM):
    supports_torch_compile = True

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
    config |= sizes | overrides
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = HandWritten(SimpleNamespace(hf_config=SimpleNamespace(**config)))
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.15)
    save_file(dict(model.named_parameters()), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    "eager", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["eager", "compiled"]
)
@pytest.mark.parametrize(("sizes", "q_rank"), [(REAL, 24), (SMALL, 0)], ids=["512+64", "48+16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_sampled_token_is_equal(sizes, q_rank, dtype, eager, tmp_path):
    vllm_graft.register(ARCH, HandWritten)
    with engine(
        checkpoint(tmp_path, sizes, q_rank), ARCH, dtype=dtype, enable_prefix_caching=True,
        max_num_batched_tokens=96, enable_chunked_prefill=True, enforce_eager=eager,
    ) as llm:  # fmt: skip
        module, tokens = live_module(llm), prompts(LENGTHS, vocab_size=128)
        sampling = {"temperature": 1.0, "max_tokens": 20}
        together = generate(llm, tokens, **sampling)
        assert count_equal(module, tokens, together) == (180, 180)
        cached = [generate(llm, [prompt], **sampling)[0] for prompt in tokens]
        assert count_equal(module, tokens, cached) == (180, 180)


def in_place(weight):
    weight.mul_(-0.7)


def behind_the_version_counter(weight):
    weight.data.mul_(-0.7)


def other_storage(weight):
    weight.data = weight.data * -0.7


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
def test_a_changed_wkv_b_reaches_the_next_generation(exact, tmp_path):
    """vLLM's own MLA layer serves copies of `wkv_b`, made when loading was complete."""
    vllm_graft.register(ARCH, HandWritten)
    options = {"additional_config": {"vllm_graft_exact": exact}, "dtype": "float32"}
    folder = checkpoint(tmp_path, REAL, **({} if exact else DEEPSEEK))
    with engine(folder, ARCH, enable_prefix_caching=False, **options) as llm:
        module, tokens = live_module(llm), prompts((5, 40), vocab_size=128)
        before = [sampled_logprobs(c) for c in generate(llm, tokens, max_tokens=8)]
        for change in (in_place, behind_the_version_counter, other_storage):
            with torch.no_grad():
                change(module.layers[0].attention.wkv_b.weight)
            after = generate(llm, tokens, max_tokens=8)
            assert [sampled_logprobs(c) for c in after] != before
            before = [sampled_logprobs(c) for c in after]
            if exact:
                assert count_equal(module, tokens, after) == (16, 16)
            trained = training_logprobs(module, tokens, [list(c.token_ids) for c in after])
            # fp32; vLLM's prefill expands keys and values, which adds in another order.
            assert torch.cat(trained).tolist() == pytest.approx(
                [x for row in before for x in row], abs=1e-4
            )


def test_an_optimizer_step_reaches_the_next_generation(tmp_path):
    vllm_graft.register(ARCH, HandWritten)
    with engine(checkpoint(tmp_path, REAL, 24), ARCH, dtype="float32") as llm:
        module, tokens = live_module(llm), prompts((5, 40), vocab_size=128)
        first = generate(llm, tokens, max_tokens=8)
        trained = training_logprobs(module, tokens, [list(c.token_ids) for c in first])
        torch.cat(trained).sum().backward()
        assert all(p.grad is not None for p in module.parameters())
        torch.optim.SGD(module.parameters(), lr=0.01).step()
        llm.reset_prefix_cache()
        second = generate(llm, tokens, max_tokens=8)
        assert [sampled_logprobs(c) for c in second] != [sampled_logprobs(c) for c in first]
        assert count_equal(module, tokens, second) == (16, 16)


@pytest.mark.parametrize("sizes", [REAL, SMALL], ids=["512+64", "48+16"])
def test_the_cache_holds_one_latent_vector_per_token_and_layer(sizes, tmp_path):
    vllm_graft.register(ARCH, HandWritten)
    width = sizes["kv_lora_rank"] + sizes["qk_rope_head_dim"]
    with engine(checkpoint(tmp_path, sizes), ARCH, dtype="bfloat16") as llm:
        config = llm.llm_engine.vllm_config
        specs = [layer.get_kv_cache_spec(config) for layer in adapter(llm).kv_layers]
        bytes_per_token = [spec.page_size_bytes / spec.block_size for spec in specs]
        assert bytes_per_token == [width * 2, width * 2]
        caches = [layer.kv_cache for layer in adapter(llm).kv_layers]
        assert {cache.shape[1:] for cache in caches} == {(16, width)}


@pytest.mark.parametrize(
    ("sizes", "options", "text"),
    [
        (REAL | {"kv_lora_rank": 640}, {}, "kv_lora_rank=640, qk_rope_head_dim=64: .* at the most"),
        (SMALL, {"additional_config": {"vllm_graft_exact": False}}, "or exact serving, which pads"),
        (REAL, {"additional_config": {"vllm_graft_exact": False}}, "model_type='qwen3': .*exactly"),
        (REAL, {"kv_cache_dtype": "fp8"}, "kv_cache_dtype='fp8': .*leave it at 'auto'"),
    ],
    ids=["too wide", "fast", "not MLA to vLLM", "fp8 cache"],
)
def test_what_cannot_be_served_is_named_before_the_engine_starts(sizes, options, text, tmp_path):
    vllm_graft.register(ARCH, HandWritten)
    with pytest.raises(ValueError, match=f"layers.0.attention: .*{text}"):
        engine(checkpoint(tmp_path, sizes), ARCH, **options).__enter__()


def test_on_hosts_with_amx_the_proven_kernel_is_pinned(monkeypatch, tmp_path):
    """There vLLM would take AMX_MLA, which packs `wkv_b`, frees it and has its own arithmetic."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    vllm_graft.register(ARCH, HandWritten)
    folder = checkpoint(tmp_path, REAL, **DEEPSEEK)
    with engine(folder, ARCH, dtype="bfloat16", max_num_batched_tokens=96) as llm:
        assert llm.llm_engine.vllm_config.cache_config.block_size == 128
        layers, module = adapter(llm).kv_layers, live_module(llm)
        assert {layer.attn_backend.get_name() for layer in layers} == {"CPU_MLA"}
        assert {layer.kv_cache.shape[1] for layer in layers} == {16}
        tokens = prompts(LENGTHS, vocab_size=128)
        assert count_equal(module, tokens, generate(llm, tokens, max_tokens=20)) == (180, 180)
        cached = generate(llm, tokens, max_tokens=20)
        assert count_equal(module, tokens, cached) == (180, 180)


@pytest.mark.parametrize(
    ("config", "options", "text"),
    [
        (DEEPSEEK, {"kv_cache_dtype": "fp8", "dtype": "bfloat16"}, "kv_cache_dtype='fp8'.*'auto'"),
        ({}, {"additional_config": {"vllm_graft_exact": False}}, "model_type=.qwen3.: .*for MLA"),
        ({}, {"additional_config": {"vllm_graft_exact": "false"}}, "exact='false'; use true or"),
    ],
    ids=["fp8 cache", "fast but not MLA to vLLM", "no boolean"],
)
def test_settings_that_cannot_be_served_are_refused_before_the_first_request(
    config, options, text, tmp_path
):
    vllm_graft.register(ARCH, HandWritten)
    with pytest.raises(ValueError, match=text):
        engine(checkpoint(tmp_path, REAL, **config), ARCH, **options).__enter__()
