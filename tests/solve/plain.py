"""One decoder written by hand, in the names of several code bases, for twelve architectures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Arch:
    """What an architecture does otherwise than Llama."""

    norm: str = "rms"
    """rms, gemma (its weight is one less), layer (LayerNorm) or bare (that without a bias)."""
    qkv_bias: bool = False
    bias: bool = False
    pre: bool = True
    post: bool = False
    parallel: bool = False
    gated: bool = True
    qk_norm: str = ""
    """head (over a head), all (over all heads) or none."""


ARCHS = {
    "llama": Arch(),
    "qwen2": Arch(qkv_bias=True),
    "qwen3": Arch(qk_norm="head"),
    "mistral": Arch(),
    "phi3": Arch(),
    "granite": Arch(),
    "olmo2": Arch(pre=False, post=True, qk_norm="all"),
    "gemma2": Arch(norm="gemma", post=True),
    "gemma3_text": Arch(norm="gemma", post=True, qk_norm="head"),
    "cohere": Arch(norm="bare", parallel=True),
    "gpt2": Arch(norm="layer", qkv_bias=True, bias=True, gated=False),
    "gpt_neox": Arch(norm="layer", qkv_bias=True, bias=True, parallel=True, gated=False),
}


@dataclass(frozen=True)
class Style:
    """Names of a code base, and its RoPE order."""

    names: dict[str, str]
    pairs: bool
    complex_table: bool = False


_NORMS = {"attn_out": "post_attn_norm", "mlp_out": "post_ffn_norm"}
_LLAMA = _NORMS | {
    "embed": "tok_embeddings", "layers": "layers", "attn": "attention", "o": "wo",
    "mlp": "feed_forward", "down": "w2", "attn_in": "attention_norm", "mlp_in": "ffn_norm",
    "norm": "norm", "head": "output", "positions": "pos_emb",
}  # fmt: skip
STYLES = {
    "llama": Style(
        _LLAMA | {"q": "wq", "k": "wk", "v": "wv", "gate": "w1", "up": "w3"},
        pairs=True, complex_table=True,
    ),
    "fast": Style(_LLAMA | {"qkv": "wqkv", "gate_up": "w13", "up": "w3"}, pairs=True),
    "nano": Style(
        _NORMS | {
            "embed": "wte", "positions": "wpe", "layers": "h", "attn": "attn", "qkv": "c_attn",
            "o": "c_proj", "mlp": "mlp", "gate": "w_gate", "up": "c_fc", "down": "c_proj",
            "attn_in": "ln_1", "mlp_in": "ln_2", "norm": "ln_f", "head": "lm_head",
        },
        pairs=False,
    ),
}  # fmt: skip


class Norm(nn.Module):
    def __init__(self, kind, size, eps):
        super().__init__()
        self.kind, self.eps = kind, eps
        self.weight = nn.Parameter(torch.ones(size))
        if kind == "layer":
            self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x):
        if self.kind in ("layer", "bare"):
            return F.layer_norm(x, x.shape[-1:], self.weight, getattr(self, "bias", None), self.eps)
        weight = self.weight + 1 if self.kind == "gemma" else self.weight
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * weight


def linears(module, sizes, bias, names):
    """Linear layers by role, those that a style fuses as one."""
    fused = next((role for role in ("qkv", "gate_up") if role in names and len(sizes) > 1), None)
    width = next(iter(sizes.values()))[0]
    if fused is not None:
        outputs = [size for _, size in sizes.values()]
        setattr(module, names[fused], nn.Linear(width, sum(outputs), bias=bias))
        return lambda x: getattr(module, names[fused])(x).split(outputs, -1)
    for role, (inputs, outputs) in sizes.items():
        setattr(module, names[role], nn.Linear(inputs, outputs, bias=bias))
    return lambda x: [getattr(module, names[role])(x) for role in sizes]


class Attention(nn.Module):
    def __init__(self, config, arch, style, index):
        super().__init__()
        self.heads = config.num_attention_heads
        self.groups = getattr(config, "num_key_value_heads", None) or self.heads
        width = config.hidden_size
        self.dim = getattr(config, "head_dim", None) or width // self.heads
        inner, few = self.heads * self.dim, self.groups * self.dim
        names, self.arch, self.pairs = style.names, arch, style.pairs
        names = {key: name for key, name in names.items() if key != "gate_up"}
        sizes = {"q": (width, inner), "k": (width, few), "v": (width, few)}
        self.project = linears(self, sizes, arch.qkv_bias, names)
        self.out = linears(self, {"o": (inner, width)}, arch.bias, names)
        if arch.qk_norm:
            kind = "gemma" if arch.norm == "gemma" else "rms"
            whole = arch.qk_norm == "all"
            self.q_norm = Norm(kind, inner if whole else self.dim, config.rms_norm_eps)
            self.k_norm = Norm(kind, few if whole else self.dim, config.rms_norm_eps)
        scalar = getattr(config, "query_pre_attn_scalar", self.dim)
        self.scale = getattr(config, "attention_multiplier", scalar**-0.5)
        self.softcap = getattr(config, "attn_logit_softcapping", None)
        kinds = getattr(config, "layer_types", None)
        slides = kinds is None or kinds[index] == "sliding_attention"
        self.window = getattr(config, "sliding_window", None) if slides else None

    def forward(self, x, angles):
        b, length, _ = x.shape
        q, k, v = self.project(x)
        if self.arch.qk_norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.view(b, length, -1, self.dim).transpose(1, 2) for y in (q, k, v))
        if self.arch.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = self.rotate(q, angles), self.rotate(k, angles)
        k, v = (y.repeat_interleave(self.heads // self.groups, 1) for y in (k, v))
        scores = q @ k.mT * self.scale
        if self.softcap:
            scores = self.softcap * (scores / self.softcap).tanh()
        distance = torch.arange(length)[:, None] - torch.arange(length)
        hidden = (distance < 0) | (distance >= (self.window or length))
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, length, -1))[0]

    def rotate(self, x, angles):
        size = 2 * angles.shape[-1]
        turned, rest = x[..., :size], x[..., size:]
        by_turns = turned.unflatten(-1, (-1, 2)).unbind(-1)
        first, second = by_turns if self.pairs else turned.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        parts = (first * cos - second * sin, second * cos + first * sin)
        made = torch.stack(parts, -1).flatten(-2) if self.pairs else torch.cat(parts, -1)
        return torch.cat([made, rest], -1)


class Mlp(nn.Module):
    def __init__(self, config, arch, style):
        super().__init__()
        from transformers.activations import ACT2FN

        width = config.hidden_size
        hidden = getattr(config, "intermediate_size", None) or 4 * width
        roles = ["gate", "up"] if arch.gated else ["up"]
        names = {key: name for key, name in style.names.items() if key != "qkv"}
        self.project = linears(self, dict.fromkeys(roles, (width, hidden)), arch.bias, names)
        self.out = linears(self, {"down": (hidden, width)}, arch.bias, names)
        act = next(
            getattr(config, name)
            for name in ("hidden_act", "hidden_activation", "activation_function")
            if getattr(config, name, None)
        )
        self.act = ACT2FN[act]

    def forward(self, x):
        first, *up = self.project(x)
        return self.out(self.act(first) * up[0] if up else self.act(first))[0]


class Block(nn.Module):
    def __init__(self, config, arch, style, index):
        super().__init__()
        self.names, self.arch = style.names, arch
        self.factor = getattr(config, "residual_multiplier", 1.0)
        setattr(self, self.names["attn"], Attention(config, arch, style, index))
        setattr(self, self.names["mlp"], Mlp(config, arch, style))
        one = arch.parallel and arch.norm == "bare"
        before = ["attn_in"] if one else ["attn_in", "mlp_in"]
        for role in (before if arch.pre else []) + (["attn_out", "mlp_out"] if arch.post else []):
            setattr(self, self.names[role], Norm(arch.norm, config.hidden_size, eps_of(config)))

    def at(self, role, x):
        module = getattr(self, self.names[role], None)
        return x if module is None else module(x)

    def forward(self, x, angles):
        attn, mlp = getattr(self, self.names["attn"]), getattr(self, self.names["mlp"])
        came = self.at("attn_in", x)
        if self.arch.parallel:
            other = self.at("mlp_in", x) if hasattr(self, self.names["mlp_in"]) else came
            return x + attn(came, angles) + mlp(other)
        x = x + self.at("attn_out", attn(came, angles)) * self.factor
        return x + self.at("mlp_out", mlp(self.at("mlp_in", x))) * self.factor


class Plain(nn.Module):
    """Token ids `[B, L]` to logits `[B, L, V]`."""

    def __init__(self, config, style):
        super().__init__()
        arch, self.config, names = ARCHS[config.model_type], config, style.names
        self.names, self.gemma = names, arch.norm == "gemma"
        setattr(self, names["embed"], nn.Embedding(config.vocab_size, config.hidden_size))
        self.learned = config.model_type == "gpt2"
        if self.learned:
            setattr(self, names["positions"], nn.Embedding(config.n_positions, config.hidden_size))
        blocks = [Block(config, arch, style, i) for i in range(config.num_hidden_layers)]
        setattr(self, names["layers"], nn.ModuleList(blocks))
        setattr(self, names["norm"], Norm(arch.norm, config.hidden_size, eps_of(config)))
        setattr(self, names["head"], nn.Linear(config.hidden_size, config.vocab_size, bias=False))
        if style.complex_table:
            self.register_buffer("freqs_cis", torch.polar(*torch.ones(2, 64, 8)), persistent=False)

    def part(self, role):
        return getattr(self, self.names[role])

    def angles(self, index, length):
        if self.learned:
            return None
        rope = self.config.rope_parameters
        rope = rope.get(self.config.layer_types[index], rope) if "rope_theta" not in rope else rope
        dim = self.part("layers")[0].get_submodule(self.names["attn"]).dim
        size = int(dim * rope.get("partial_rotary_factor", 1.0))
        inverse = rope["rope_theta"] ** -(torch.arange(0, size, 2) / size)
        return torch.outer(torch.arange(length).float(), inverse)

    def forward(self, tokens):
        config, length = self.config, tokens.shape[1]
        x = self.part("embed")(tokens) * getattr(config, "embedding_multiplier", 1.0)
        if self.gemma:
            x = x * config.hidden_size**0.5
        if self.learned:
            x = x + self.part("positions").weight[:length]
        for index, block in enumerate(self.part("layers")):
            x = block(x, self.angles(index, length))
        logits = self.part("head")(self.part("norm")(x)) * getattr(config, "logit_scale", 1.0)
        logits = logits / getattr(config, "logits_scaling", 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if cap is None else cap * (logits / cap).tanh()


def eps_of(config):
    names = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
    return next(getattr(config, name) for name in names if hasattr(config, name))
