"""Solved plans load what the hand-written mappings load; what is not decided is an error."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from examples.custom_models.deepseek_v3_torchtitan import build_deepseek_v3_torchtitan
from examples.custom_models.megatron_gpt import build_megatron_model
from examples.custom_models.qwen3_torchtitan import build_qwen3_torchtitan
from tests.megatron_checkpoints import deepseek_checkpoint, llama_checkpoint, qwen2_checkpoint
from tests.moe_checkpoints import deepseek_v3_checkpoint, fp8_checkpoint, qwen3_moe_checkpoint
from tests.support import qwen3_checkpoint
from vllm_graft import WeightError, load_weight_plan, solve_weight_plan
from vllm_graft.weights.shards import Shard, mark_shard


def halves_checkpoint(folder):
    return deepseek_v3_checkpoint(folder, rope_interleave=False)


def halves_dense_checkpoint(folder):
    return deepseek_checkpoint(folder, rope_interleave=False)


CASES = {
    "titan_qwen3": (qwen3_checkpoint, build_qwen3_torchtitan),
    "titan_qwen3_moe": (qwen3_moe_checkpoint, build_qwen3_torchtitan),
    "titan_deepseek_v3": (deepseek_v3_checkpoint, build_deepseek_v3_torchtitan),
    "titan_deepseek_v3_halves": (halves_checkpoint, build_deepseek_v3_torchtitan),
    "megatron_deepseek_halves": (halves_dense_checkpoint, build_megatron_model),
    "megatron_qwen3": (qwen3_checkpoint, build_megatron_model),
    "megatron_llama": (llama_checkpoint, build_megatron_model),
    "megatron_qwen2": (qwen2_checkpoint, build_megatron_model),
    "megatron_deepseek": (deepseek_checkpoint, build_megatron_model),
}


def built(build, folder):
    """The wrapper, every parameter NaN: what a plan leaves out is seen."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    made = SimpleNamespace(max_model_len=64, dtype=torch.float32)
    wrapper = build(SimpleNamespace(hf_config=config, model_config=made), None)
    for parameter in wrapper.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    return wrapper


@pytest.mark.parametrize("case", CASES)
def test_a_solved_plan_loads_what_the_hand_written_mapping_loads(case, tmp_path):
    make, build = CASES[case]
    checkpoint = make(tmp_path / "checkpoint")
    tensors = load_file(checkpoint / "model.safetensors")
    by_hand, solved = built(build, checkpoint), built(build, checkpoint)
    by_hand.load_weights(tensors.items())
    solve_weight_plan(solved.model, checkpoint).save(tmp_path / "plan.json")
    load_weight_plan(tmp_path / "plan.json").load(solved.model, tensors.items())
    want = by_hand.model.state_dict()
    for name, tensor in solved.model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(tensor, want[name]), name


def swapped(tensors):
    first, second = (f"model.layers.{n}.mlp.down_proj.weight" for n in (0, 1))
    tensors[first.replace("down", "side")] = tensors.pop(second)


FAULTS = {
    "missing": lambda t: t.pop("model.norm.weight"),
    "one layer's missing": lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"),
    "surplus": lambda t: t.update({"model.extra.weight": torch.zeros(3)}),
    "shape": lambda t: t.update({"model.norm.weight": torch.zeros(7)}),
    "name": swapped,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("build", [build_qwen3_torchtitan, build_megatron_model])
def test_a_wrong_checkpoint_gets_no_plan(fault, build, tmp_path):
    from transformers import AutoConfig

    checkpoint = qwen3_checkpoint(tmp_path)
    tensors = load_file(checkpoint / "model.safetensors")
    FAULTS[fault](tensors)
    config = AutoConfig.from_pretrained(checkpoint).to_dict()
    with pytest.raises(WeightError, match="no plan"):
        solve_weight_plan(built(build, checkpoint).model, tensors, config)


@pytest.mark.parametrize("interleaved", [True, False])
def test_fp8_scales_go_with_their_tensors(interleaved, tmp_path):
    source = deepseek_v3_checkpoint(tmp_path / "wide", rope_interleave=interleaved)
    fp8, plain = fp8_checkpoint(tmp_path, source)
    model, want = (built(build_deepseek_v3_torchtitan, plain) for _ in range(2))
    solve_weight_plan(model, fp8).load(model, load_file(fp8 / "model.safetensors").items())
    want.load_weights(load_file(plain / "model.safetensors").items())
    for (name, got), (_, tensor) in zip(
        model.named_parameters(), want.named_parameters(), strict=True
    ):
        assert torch.equal(got, tensor), name


def test_layers_of_multi_token_prediction_are_waived(tmp_path):
    folder = deepseek_v3_checkpoint(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.startswith("model.layers.2.")]:
        tensors[name.replace(".2.", ".3.")] = tensors[name].clone()
    config = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    model = built(build_deepseek_v3_torchtitan, folder)
    with pytest.raises(WeightError, match="names and shapes leave open"):
        solve_weight_plan(model, tensors, config)
    tensors["model.layers.3.eh_proj.weight"] = torch.zeros(3)
    plan = solve_weight_plan(model, tensors, config)
    assert [line.source for line in plan.lines if line.target is None] == ["model.layers.3.*"]
    plan.load(model, tensors.items())


def test_a_plan_that_was_edited_wrongly_names_its_line(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text('{"version": 1, "lines": [{"from": "a", "into": "b"}]}')
    with pytest.raises(WeightError, match=r"line 0 of the plan: expected from, to"):
        load_weight_plan(path)


def test_rows_of_a_share_are_refused(tmp_path, monkeypatch):
    checkpoint = qwen3_checkpoint(tmp_path)
    model = built(build_megatron_model, checkpoint).model
    plan = solve_weight_plan(model, checkpoint)
    monkeypatch.setattr(Shard, "count", 2)
    mark_shard(model.decoder.layers[0].mlp.linear_fc1.weight, Shard(0, 0, None))
    with pytest.raises(WeightError, match=r"linear_fc1.weight' is sharded over 2 ranks"):
        plan.load(model, load_file(checkpoint / "model.safetensors").items())
