"""Gemma 3 written by hand and adapted, against Transformers' own: tied head, scaled embeddings,
biases, QK norm, a softmax scale of its own.

Gemma's queries, keys and norms are as in its paper; every layer sees the whole sequence.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

import vllm_graft
from vllm_graft.doctor.rotations import Rope
from vllm_graft.doctor.sides import Adapted, ModuleReference

WIDTH, HEADS, KV_HEADS, SIZE, VOCAB, THETA, SCALAR = 128, 4, 2, 32, 97, 1_000_000.0, 48
ROPE = {"rope_type": "default", "rope_theta": THETA}
SIZES = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": SIZE,
    "attention_bias": True, "query_pre_attn_scalar": SCALAR, "max_position_embeddings": 128,
    "layer_types": ["full_attention"] * 2, "rms_norm_eps": 1e-6,
    "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
}  # fmt: skip


class Norm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(size)), 1e-6

    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * (1 + self.weight)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k_proj, self.v_proj = (nn.Linear(WIDTH, KV_HEADS * SIZE) for _ in range(2))
        self.q_norm, self.k_norm = Norm(SIZE), Norm(SIZE)
        self.rope, self.shift, self.scale = Rope("half-split", THETA), 0, SCALAR**-0.5

    def forward(self, x, positions):
        q, k, v = (p(x).unflatten(-1, (-1, SIZE)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = self.rope.turn(q, positions + self.shift, 1)
        k = self.rope.turn(k, positions, 1)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=True
        )
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, 192, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(192, WIDTH, bias=False)

    def forward(self, x):
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp = Attention(), MLP()
        self.input_layernorm, self.post_attention_layernorm = Norm(WIDTH), Norm(WIDTH)
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = Norm(WIDTH), Norm(WIDTH)

    def forward(self, x, positions):
        attended = self.self_attn(self.input_layernorm(x), positions)
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Gemma(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(VOCAB, WIDTH)
        self.model.layers = nn.ModuleList(Block() for _ in range(2))
        self.model.norm = Norm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight
        self.scale = math.sqrt(WIDTH)

    def forward(self, tokens, positions):
        x = self.model.embed_tokens(tokens) * self.scale
        for layer in self.model.layers:
            x = layer(x, positions)
        return self.lm_head(self.model.norm(x))


def ports():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(**SIZES)
    original = Gemma3ForCausalLM._from_config(config, attn_implementation="eager").eval()
    for name, parameter in original.named_parameters():
        spread = 0.05 if parameter.dim() > 1 else 0.1 if name.endswith("bias") else 0.3
        nn.init.normal_(parameter, std=spread)
    model = Gemma()
    model.load_state_dict(original.state_dict())
    port = vllm_graft.adapt(model)
    reference = ModuleReference(original, lambda t: original(t[None]).logits[0], "transformers")
    return Adapted(port), reference, config


def _attentions(port):
    return [layer.self_attn for layer in port.model.model.layers]


def swap_gate_up(port):
    for layer in port.model.model.layers:
        gate, up = layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight
        gate.data, up.data = up.data, gate.data


def rotate(**options):
    def inject(port):
        for attention in _attentions(port):
            attention.rope = Rope(**{"style": "half-split", "theta": THETA, **options})

    return inject


def no_qk_norm(port):
    for attention in _attentions(port):
        attention.q_norm = attention.k_norm = None


def transpose(port):
    for attention in _attentions(port):
        attention.q_proj.weight.data = attention.q_proj.weight.data.T.clone()


def other_eps(port):
    for module in port.modules():
        if isinstance(module, Norm):
            module.eps = 1e-5


def no_bias(port):
    for attention in _attentions(port):
        attention.o_proj.bias = None


def other_softmax_scale(port):
    for core in port.cores:
        core.spec = replace(core.spec, scale=SIZE**-0.5)


def early_queries(port):
    for attention in _attentions(port):
        attention.shift = -1


def untie(port):
    port.model.lm_head.weight = nn.Parameter(torch.randn(VOCAB, WIDTH) * 0.05)


def unscaled(port):
    port.model.scale = 1.0


FAULTS = {
    "swapped gate/up": swap_gate_up,
    "RoPE: interleaved against half-split": rotate(style="interleaved"),
    "wrong RoPE theta": rotate(theta=10_000.0),
    "missing QK norm": no_qk_norm,
    "transposed weight": transpose,
    "wrong norm eps": other_eps,
    "dropped bias": no_bias,
    "wrong softmax scale": other_softmax_scale,
    "off-by-one positions": early_queries,
    "untied head": untie,
    "missing embedding scale": unscaled,
}
