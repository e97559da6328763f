"""TorchTitan's Qwen3 against Transformers' Qwen3, both with biases and scaled embeddings too."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import nn

from vllm_graft.doctor.rotations import Rope
from vllm_graft.doctor.sides import Adapted, ModuleReference
from vllm_graft.examples.qwen3_torchtitan import build_qwen3_torchtitan

WIDTH, SIZE, VOCAB, THETA = 128, 32, 97, 1_000_000.0
SIZES = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": SIZE,
    "rope_parameters": {"rope_type": "default", "rope_theta": THETA}, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip
PROJECTIONS = ("qkv_linear.wq", "qkv_linear.wk", "qkv_linear.wv", "wo")


def ports():
    from transformers import Qwen3Config

    config = Qwen3Config(**SIZES)
    torch.manual_seed(0)
    original = _original(Qwen3Config(**SIZES, attention_bias=True))
    model_config = SimpleNamespace(max_model_len=128, dtype=torch.float32)
    port = build_qwen3_torchtitan(
        SimpleNamespace(hf_config=config, model_config=model_config), None
    )
    weights = original.state_dict()
    port.load_weights((n, t) for n, t in weights.items() if not n.endswith("bias"))
    for index, attention in enumerate(_attentions(port)):
        for name, letter in zip(PROJECTIONS, "qkvo", strict=True):
            bias = weights[f"model.layers.{index}.self_attn.{letter}_proj.bias"]
            attention.get_submodule(name).bias = nn.Parameter(bias.clone())
    port.scaling = port.model.tok_embeddings.register_forward_hook(_scale)
    original.model.embed_tokens.register_forward_hook(_scale)
    reference = ModuleReference(original, lambda t: original(t[None]).logits[0], "transformers")
    return Adapted(port), reference, original.config


def _original(config):
    from transformers import Qwen3ForCausalLM

    model = Qwen3ForCausalLM._from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        # Qwen3's own spread: an eps of 1e-5 must matter beside the squares of its values.
        spread = 0.02 if parameter.dim() > 1 else 0.3
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=spread)
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            nn.init.normal_(getattr(layer.self_attn, name).bias, std=0.1)
    return model


def _scale(module, inputs, output):
    return output * math.sqrt(WIDTH)


def _attentions(port):
    return [layer.attention for layer in port.model.layers.values()]


def swap_gate_up(port):
    with torch.no_grad():
        for layer in port.model.layers.values():
            ffn = layer.feed_forward
            ffn.w1.weight.data, ffn.w3.weight.data = ffn.w3.weight.data, ffn.w1.weight.data


def rotate(**options):
    rope = Rope(**{"style": "half-split", "theta": THETA, **options})

    def turn(q, k, positions):
        return tuple(rope.turn(x, positions[0], 1) for x in (q, k))

    def inject(port):
        for attention in _attentions(port):
            attention.rope.forward = turn

    return inject


def no_qk_norm(port):
    for attention in _attentions(port):
        attention.q_norm = attention.k_norm = None


def transpose(port):
    weight = _attentions(port)[1].wo.weight
    weight.data = weight.data.T.clone()


def other_eps(port):
    for module in port.modules():
        if isinstance(module, nn.RMSNorm):
            module.eps = 1e-5


def no_bias(port):
    for attention in _attentions(port):
        for name in PROJECTIONS:
            attention.get_submodule(name).bias = None


def other_softmax_scale(port):
    for attention in _attentions(port):
        core = attention.inner_attention
        attention.scaling = 1.0
        core.spec = replace(core.spec, scale=1.0)


def early_keys(port):
    rope = Rope("half-split", THETA)

    def turn(q, k, positions):
        return rope.turn(q, positions[0], 1), rope.turn(k, positions[0] - 1, 1)

    for attention in _attentions(port):
        attention.rope.forward = turn


def untie(port):
    port.model.lm_head.weight = nn.Parameter(torch.randn(VOCAB, WIDTH) * 0.02)


def unscaled(port):
    port.scaling.remove()


FAULTS = {
    "swapped gate/up": swap_gate_up,
    "RoPE: interleaved against half-split": rotate(style="interleaved"),
    "wrong RoPE theta": rotate(theta=10_000.0),
    "missing QK norm": no_qk_norm,
    "transposed weight": transpose,
    "wrong norm eps": other_eps,
    "dropped bias": no_bias,
    "wrong softmax scale": other_softmax_scale,
    "off-by-one positions": early_keys,
    "untied head": untie,
    "missing embedding scale": unscaled,
}
