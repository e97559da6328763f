"""Tiny mixture-of-experts checkpoints, one tensor per expert as on the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support import QWEN3_SIZES, spread_weights

DEEPSEEK_SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 192,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 96,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "max_position_embeddings": 1024,
    "num_nextn_predict_layers": 0,
    # vLLM reads these two; Transformers knows only them.
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.9,
    "mscale_all_dim": 0.9,
}


def qwen3_moe_checkpoint(folder: Path, **overrides: Any) -> Path:
    """A small random Qwen3-MoE checkpoint in Hugging Face format (float32)."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    experts = {
        "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 96,
        "norm_topk_prob": True,
    }  # fmt: skip
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**(QWEN3_SIZES | experts | overrides)))
    _vary_tokens(spread_weights(model))
    model.save_pretrained(folder)
    return folder


def deepseek_v3_checkpoint(folder: Path, **overrides: Any) -> Path:
    """A small random DeepSeek V3 with the real MLA sizes, in Hugging Face format (float32).

    Its router biases are about as wide as its scores, so routing depends on both.
    """
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    model = DeepseekV3ForCausalLM(DeepseekV3Config(**(DEEPSEEK_SIZES | overrides)))
    _vary_tokens(spread_weights(model))
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def _vary_tokens(model: Any) -> None:
    """Keep attention, nearly uniform with random weights, from making all tokens alike."""
    model.model.embed_tokens.weight.mul_(10)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(0.3)


def fp8_checkpoint(folder: Path, source: Path) -> tuple[Path, Path]:
    """The checkpoint `source` in block-wise FP8, and the same numbers dequantized to float32."""
    tensors = load_file(source / "model.safetensors")
    quantized, plain = {}, {}
    for name, tensor in tensors.items():
        quantized[name] = plain[name] = tensor
        if is_quantized(name):
            quantized[name], scale = to_fp8(tensor)
            quantized[f"{name}_scale_inv"] = scale
            plain[name] = from_fp8(quantized[name], scale)
    config = json.loads((source / "config.json").read_text())
    recipe = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }  # fmt: skip
    fp8 = _write(folder / "fp8", quantized, config | {"quantization_config": recipe})
    return fp8, _write(folder / "dequantized", plain, config)


def is_quantized(name: str) -> bool:
    """Whether DeepSeek's release stores this tensor in FP8: all projections but the router's."""
    return name.endswith("_proj.weight") or name.endswith("kv_a_proj_with_mqa.weight")


def to_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Block-wise FP8: values `[M, N]` e4m3, inverse scales `[M/128, N/128]` float32."""
    rows, columns = (-(-size // 128) for size in weight.shape)
    scale = torch.empty(rows, columns)
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            scale[i, j] = weight[block].abs().max() / 448
            values[block] = (weight[block] / scale[i, j]).to(torch.float8_e4m3fn)
    return values, scale


def from_fp8(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The float32 numbers that `values` and `scale` stand for."""
    wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return values.float() * wide[: values.shape[0], : values.shape[1]]


def _write(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder
