"""A decoder written for Graft, its `CoreAttention` in sight; the reference is a copy of it."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from vllm_graft import CoreAttention
from vllm_graft.doctor.rotations import Rope
from vllm_graft.doctor.sides import Adapted, ModuleReference
from vllm_graft.positions import packed

WIDTH, HEADS, SIZE, VOCAB = 64, 4, 16, 97
CONFIG = SimpleNamespace(hidden_size=WIDTH, rope_theta=10_000.0)


class Norm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), 1e-6

    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=name != "o_proj"))
        self.q_norm, self.k_norm = Norm(SIZE), Norm(SIZE)
        self.core = CoreAttention(HEADS, HEADS, SIZE)
        self.rope, self.q_shift = Rope("half-split", 10_000.0), 0

    def forward(self, x, positions):
        q, k, v = (
            p(x).unflatten(-1, (HEADS, SIZE)) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = self.rope.turn(q, positions + self.q_shift, 1)
        return self.o_proj(self.core(q, self.rope.turn(k, positions, 1), v).flatten(-2))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, 96, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(96, WIDTH, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp = Attention(), MLP()
        self.one, self.two = Norm(WIDTH), Norm(WIDTH)

    def forward(self, x, positions):
        x = x + self.self_attn(self.one(x), positions)
        return x + self.mlp(self.two(x))


class Model(nn.Module):
    """A decoder with every part that a fault needs; `SCALED` embeddings and a tied head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.scale = Norm(WIDTH), math.sqrt(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.head.weight = self.embed.weight
        for name, parameter in self.named_parameters():
            if "norm" in name:
                nn.init.normal_(parameter, mean=1.0, std=0.3)

    def forward(self, input_ids, positions):
        x = self.embed(input_ids) * self.scale
        for layer in self.layers:
            x = layer(x, positions)
        return self.norm(x)

    def compute_logits(self, hidden):
        return self.head(hidden) * 10


def reference_of(model):
    def logits(tokens):
        with packed([0, len(tokens)]):
            return model.compute_logits(model(tokens, positions=torch.arange(len(tokens))))

    return ModuleReference(model, logits, "original")


def ports():
    model = Model()
    return Adapted(copy.deepcopy(model)), reference_of(model), CONFIG


def swap_gate_up(model):
    for layer in model.layers:
        mlp = layer.mlp
        mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj
        names = ("gate_proj", "up_proj")
        mlp._modules = {n: mlp._modules[n] for n in (*names, "down_proj")}


def rotate(**options):
    def inject(model):
        for layer in model.layers:
            layer.self_attn.rope = Rope(**{"style": "half-split", "theta": 10_000.0, **options})

    return inject


def no_qk_norm(model):
    for layer in model.layers:
        layer.self_attn.q_norm = layer.self_attn.k_norm = None


def transpose(model):
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.o_proj.weight.copy_(layer.self_attn.o_proj.weight.T.clone())


def other_eps(model):
    for module in model.modules():
        if isinstance(module, Norm):
            module.eps = 1e-5


def no_bias(model):
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.v_proj.bias.zero_()


def unscaled(model):
    model.scale = 1.0


def other_softmax_scale(model):
    for layer in model.layers:
        core = layer.self_attn.core
        layer.self_attn.core = CoreAttention(HEADS, HEADS, SIZE, scale=WIDTH**-0.5)
        assert core.spec != layer.self_attn.core.spec


def late_queries(model):
    for layer in model.layers:
        layer.self_attn.q_shift = 1


def untie(model):
    model.head.weight = nn.Parameter(torch.randn(VOCAB, WIDTH) * 0.02)


FAULTS = {
    "swapped gate/up": swap_gate_up,
    "RoPE: interleaved against half-split": rotate(style="interleaved"),
    "wrong RoPE theta": rotate(theta=1_000_000.0),
    "missing QK norm": no_qk_norm,
    "transposed weight": transpose,
    "wrong norm eps": other_eps,
    "dropped bias": no_bias,
    "wrong softmax scale": other_softmax_scale,
    "off-by-one positions": late_queries,
    "untied head": untie,
    "missing embedding scale": unscaled,
}
