"""Megatron's GPTModel without an engine: its numbers, gradients, weights and refusals."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import vllm_graft
from examples.custom_models.megatron_config import refuse_unsupported
from examples.custom_models.megatron_gpt import build_megatron_model
from examples.custom_models.megatron_names import qkv_rows
from tests.megatron_checkpoints import llama_checkpoint, qwen2_checkpoint
from tests.support import qwen3_checkpoint, relative_error
from vllm_graft import export_weights, replace_with_trainable_attention
from vllm_graft.doctor.corrections import seams
from vllm_graft.doctor.diagnose import diagnose
from vllm_graft.doctor.references import transformers_reference
from vllm_graft.doctor.sides import Adapted
from vllm_graft.exact import make_exact
from vllm_graft.families.megatron import MegatronCoreAttention
from vllm_graft.families.megatron_rope import megatron_device

CHECKPOINTS = {
    "qwen3": (qwen3_checkpoint, {}),
    "qwen3_tied": (qwen3_checkpoint, {"tie_word_embeddings": True}),
    "qwen3_mqa": (qwen3_checkpoint, {"num_key_value_heads": 1}),
    "qwen3_window": (
        qwen3_checkpoint,
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "llama": (llama_checkpoint, {"rms_norm_eps": 1e-4}),
    "qwen2": (qwen2_checkpoint, {}),
}


def vllm_config(hf_config, dtype=torch.float32):
    model_config = SimpleNamespace(max_model_len=128, dtype=dtype)
    return SimpleNamespace(hf_config=hf_config, model_config=model_config)


def build(checkpoint, dtype=torch.float32):
    """Megatron's model with the checkpoint's weights."""
    from transformers import AutoConfig

    model = build_megatron_model(vllm_config(AutoConfig.from_pretrained(checkpoint), dtype), None)
    model.load_weights(load_file(checkpoint / "model.safetensors").items())
    return model


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return qwen3_checkpoint(tmp_path_factory.mktemp("qwen3"))


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_forward_and_gradients_are_those_of_transformers(kind, tmp_path):
    from transformers import AutoModelForCausalLM

    write, overrides = CHECKPOINTS[kind]
    checkpoint = write(tmp_path, **overrides)
    reference = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
    model = build(checkpoint)
    tokens, labels = torch.randint(0, 512, (2, 40)), torch.randint(0, 512, (80,))
    got, want = model.compute_logits(model(tokens)), reference(tokens).logits
    # fp32 through three layers, other kernels for products, RoPE and attention.
    assert relative_error(got, want) < 1e-5
    for logits in (got, want):
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels).backward()
    assert_gradients_are_equal(model, reference)


def assert_gradients_are_equal(model, reference):
    """Gradients under their checkpoint names: as far as sums over many tokens allow."""
    gradients = copy.deepcopy(model)
    for parameter, source in zip(gradients.parameters(), model.parameters(), strict=True):
        parameter.data = source.grad
    exported = dict(export_weights(gradients.model, model.name_mapping))
    for name, parameter in reference.named_parameters():
        assert relative_error(exported[name], parameter.grad) < 2e-5, name


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_exactly(kind, dtype, tmp_path):
    write, overrides = CHECKPOINTS[kind]
    checkpoint = write(tmp_path, **overrides)
    tensors = {n: t.to(dtype) for n, t in load_file(checkpoint / "model.safetensors").items()}
    model = build(checkpoint, dtype)
    exported = dict(export_weights(model.model, model.name_mapping))
    assert exported.keys() == tensors.keys()
    assert all(torch.equal(exported[name], tensors[name]) for name in tensors)


def test_rows_of_the_fused_product_go_by_query_group():
    assert qkv_rows(4, 2, 1) == {"q": [0, 1, 4, 5], "k": [2, 6], "v": [3, 7]}
    rows = qkv_rows(6, 3, 8)
    assert sorted(chain(*rows.values())) == list(range((6 + 2 * 3) * 8))


def test_an_absent_projection_is_named(qwen3):
    model = build(qwen3)
    tensors = load_file(qwen3 / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(
        vllm_graft.WeightError, match=r"layers.1.self_attention.linear_qkv.weight\[64 rows from 64"
    ):
        model.load_weights(tensors.items())


def test_a_tensor_without_a_place_is_named(qwen3):
    tensors = load_file(qwen3 / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(128)
    with pytest.raises(
        vllm_graft.WeightError, match=r"1 checkpoint tensors have no place .*q_proj.bias"
    ):
        build(qwen3).load_weights(tensors.items())


def local_spec():
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    return get_gpt_layer_local_spec(normalization="RMSNorm")


def plain_model(spec=None, **fields):
    """Megatron's model as its users build it, without Graft."""
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    from vllm_graft.families.megatron_parallel import process_groups

    model_fields = {"position_embedding_type": "rope"} | fields.pop("model", {})
    sizes = {
        "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2,
        "normalization": "RMSNorm", "use_cpu_initialization": True, "hidden_dropout": 0.0,
        "attention_dropout": 0.0, "add_bias_linear": False,
    }  # fmt: skip
    with megatron_device():
        return GPTModel(
            config=TransformerConfig(**(sizes | fields)),
            transformer_layer_spec=spec or local_spec(),
            vocab_size=64, max_sequence_length=64, pg_collection=process_groups(),
            **model_fields,
        )  # fmt: skip


def causal_mask(length):
    """Megatron's: True where a query may not look."""
    return torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)


@pytest.fixture
def original(monkeypatch):
    """What the untouched model needs to run on CPU: groups, a buffer, no CUDA generators."""
    from contextlib import nullcontext

    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from torch.distributed import HashStore, destroy_process_group, init_process_group

    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    parallel_state._set_global_memory_buffer()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(CudaRNGStatesTracker, "fork", lambda self: nullcontext())
    yield
    parallel_state.destroy_global_memory_buffer()
    destroy_process_group()


OPTIONS = {
    "gelu": {},
    "swiglu": {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu},
    "biases": {"add_bias_linear": True},
    "interleaved_rope": {"rotary_interleaved": True},
    "part_of_rope": {"model": {"position_embedding_type": "rope", "rotary_percent": 0.5}},
    "learned_positions": {"model": {"position_embedding_type": "learned_absolute"}},
    "some_layers_without_rope": {"no_rope_freq": [1, 0]},
    "scaled_scores": {"apply_query_key_layer_scaling": True, "fp16": False},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_a_users_model_computes_the_same_after_the_swap(options, original):
    model = plain_model(**copy.deepcopy(OPTIONS[options]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float("norm" in name), std=0.2)
    tokens, positions = torch.randint(0, 64, (2, 20)), torch.arange(20).expand(2, 20)
    want, names = model(tokens, positions, causal_mask(20)), list(model.state_dict())
    report = replace_with_trainable_attention(model)
    assert (
        str(report)
        == "2 of 2 attention layers swapped (core_attention 4 heads, 2 KV heads, head_dim 16)"
    )
    assert [swap.name for swap in report.layers] == [
        f"decoder.layers.{i}.self_attention" for i in range(2)
    ]
    assert list(model.state_dict()) == names
    # fp32 through two layers, another kernel for attention.
    assert relative_error(model(tokens, positions, None), want) < 1e-5
    assert replace_with_trainable_attention(model).swapped == 0


def test_a_layer_spec_may_name_the_seam():
    spec = local_spec()
    spec.submodules.self_attention.submodules.core_attention = MegatronCoreAttention
    by_spec, swapped = plain_model(spec), plain_model()
    swapped.load_state_dict(by_spec.state_dict())
    cores = [layer.self_attention.core_attention for layer in by_spec.decoder.layers]
    assert all(isinstance(core, MegatronCoreAttention) for core in cores)
    for model in (by_spec, swapped):
        replace_with_trainable_attention(model)
    assert [layer.self_attention.core_attention for layer in by_spec.decoder.layers] == cores
    tokens, positions = torch.randint(0, 64, (2, 20)), torch.arange(20).expand(2, 20)
    assert torch.equal(by_spec(tokens, positions, None), swapped(tokens, positions, None))


def test_packed_samples_do_not_see_each_other(qwen3):
    from megatron.core.packed_seq_params import PackedSeqParams

    model = build(qwen3)
    tokens = torch.randint(0, 512, (12,))
    alone = torch.cat([model(tokens[:5]), model(tokens[5:])])
    with vllm_graft.packed([0, 5, 12]):
        together = model(tokens)
        assert torch.equal(model(tokens[None])[0], together)
    assert relative_error(together, alone) < 1e-6
    borders = torch.tensor([0, 5, 12], dtype=torch.int32)
    params = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=borders, cu_seqlens_kv=borders,
        max_seqlen_q=7, max_seqlen_kv=7,
    )  # fmt: skip
    logits = model.model(tokens[None], None, None, packed_seq_params=params)
    assert relative_error(logits[0], model.compute_logits(together)) < 1e-6


def test_given_positions_reach_rope(qwen3):
    model = build(qwen3)
    tokens = torch.randint(0, 512, (9,))
    shifted = model(tokens, positions=torch.arange(9) + 50)
    # RoPE is relative: the same shift for all tokens changes nothing but rounding.
    assert relative_error(shifted, model(tokens)) < 1e-5
    assert relative_error(model(tokens, positions=torch.arange(9) * 3), model(tokens)) > 1e-2
    with pytest.raises(IndexError, match="position 130 is outside the table of 128 rows"):
        model(tokens, positions=torch.arange(9) + 122)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tokens_row_does_not_depend_on_the_batch(qwen3, dtype):
    model = build(qwen3, dtype)
    make_exact(model)
    tokens = torch.randint(0, 512, (40,))
    with torch.no_grad():
        whole = model.compute_logits(model(tokens))
        for count in (1, 2, 3, 5, 6, 7, 9, 11, 13, 33):
            assert torch.equal(model.compute_logits(model(tokens[:count])), whole[:count])


def test_rotation_is_megatrons_bit_for_bit():
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    from vllm_graft.families.megatron_rope import table_of

    for interleaved in (False, True):
        rotary = RotaryEmbedding(
            32, 0.5, rotary_interleaved=interleaved, use_cpu_initialization=True
        )
        with megatron_device():
            angles = rotary.get_emb(20)
        table = table_of(rotary, 64)
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(20, 1, 4, 32).to(dtype)
            want = _apply_rotary_pos_emb_bshd(x, angles, rotary_interleaved=interleaved)
            assert torch.equal(table.rotate(x[:, 0], torch.arange(20)), want[:, 0])


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"window_size": (8, 8)}, r"window_size=\(8, 8\) is not causal; use \(8, 0\)"),
        ({"softmax_type": "learnable"}, r"softmax_type='learnable' \(supported: 'vanilla'\)"),
        ({"flash_decode": True}, r"flash_decode=True \(supported: False\)"),
    ],
)
def test_what_the_seam_cannot_honour_is_refused_by_name(fields, text):
    model = plain_model()
    before = model.decoder.layers[0].self_attention.core_attention
    for name, value in fields.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match=f"decoder.layers.0.self_attention: .*{text}"):
        replace_with_trainable_attention(model)
    assert model.decoder.layers[0].self_attention.core_attention is before


def test_a_rotary_module_of_another_kind_is_refused():
    model = plain_model()
    model.rotary_pos_emb = torch.nn.Identity()
    before = model.decoder.layers[0].self_attention.core_attention
    with pytest.raises(ValueError, match="Megatron's Identity; supported are RotaryEmbedding"):
        replace_with_trainable_attention(model)
    assert model.decoder.layers[0].self_attention.core_attention is before


def test_experts_are_refused_by_layer():
    model = plain_model()
    model.decoder.layers[1].mlp.token_dispatcher = object()
    before = model.decoder.layers[0].self_attention.core_attention
    with pytest.raises(ValueError, match=r"decoder.layers.1.mlp: .* TorchTitan's models only"):
        replace_with_trainable_attention(model)
    assert model.decoder.layers[0].self_attention.core_attention is before


def test_copies_and_casts_keep_the_table(qwen3):
    model = build(qwen3)
    twin = copy.deepcopy(model).to(torch.bfloat16)
    cores = [m for m in twin.modules() if isinstance(m, MegatronCoreAttention)]
    assert len(cores) == 3 and all(c.rotary == (twin.model.rotary_pos_emb,) for c in cores)
    assert torch.equal(twin.model.rotary_pos_emb.cos_sin, model.model.rotary_pos_emb.cos_sin)
    assert {p.dtype for p in twin.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ({"attention_bias": True}, r"attention_bias=True \(supported: False\)"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                 "original_max_position_embeddings": 32}},
            "rope_parameters.rope_type='yarn'",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0,
                                 "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                 "original_max_position_embeddings": 4096}},
            r"original_max_position_embeddings=4096 \(supported: 8192\)",
        ),
    ],
)  # fmt: skip
def test_config_fields_it_cannot_honour_are_refused_by_name(overrides, text):
    from transformers import Qwen3Config

    with pytest.raises(ValueError, match=text):
        refuse_unsupported(Qwen3Config(**overrides), 1)


def test_other_model_types_and_indivisible_sizes_are_refused():
    from transformers import GemmaConfig, MixtralConfig, Qwen3Config, Qwen3MoeConfig

    with pytest.raises(ValueError, match="model_type='gemma'"):
        refuse_unsupported(GemmaConfig(), 1)
    with pytest.raises(ValueError, match="has them .num_experts=128.; TorchTitan's"):
        refuse_unsupported(Qwen3MoeConfig(), 1)
    with pytest.raises(ValueError, match="has them .*experts=8"):
        refuse_unsupported(MixtralConfig(), 1)
    with pytest.raises(ValueError, match="num_key_value_heads=2 over tensor_parallel_size=4"):
        refuse_unsupported(Qwen3Config(num_key_value_heads=2), 4)


def test_the_doctor_names_a_fault_of_a_model_whose_seam_rotates(tmp_path):
    from transformers import AutoConfig

    checkpoint = llama_checkpoint(tmp_path)
    reference, model = transformers_reference(str(checkpoint)), build(checkpoint)
    for _, core in seams(model):
        core.spec = replace(core.spec, scale=2 * core.spec.scale)
    prompts = [torch.randint(0, 512, (length,)).tolist() for length in (5, 40)]
    config = AutoConfig.from_pretrained(checkpoint)
    named = diagnose(Adapted(model), reference, prompts, config)
    assert named[0].fault == "wrong softmax scale"
    assert named[0].remaining < 1e-3  # of the difference: the rest is float32's
