"""Tensor parallelism in the wrong order is refused before the first token, with the right one."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from tests.dist.launch import torchrun
from tests.moe_checkpoints import deepseek_v3_checkpoint
from tests.support import qwen3_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.slow]

ORDER = "create -> replace -> TP -> dtype"
FORGOTTEN = "weights are identical on all ranks: tensor parallelism was not applied"
TOO_EARLY = r"layers.0.attention: .* parallelized before its attention was replaced"
QWEN3 = {
    "titan_without_tp": FORGOTTEN,
    "titan_tp_first": TOO_EARLY,
    "megatron_without_tp": FORGOTTEN,
    "megatron_not_replaced": "MegatronForCausalLM has no CoreAttention",
}
DEEPSEEK = {"deepseek_without_tp": FORGOTTEN, "deepseek_tp_first": TOO_EARLY}
PLAIN = {"plan_without_tp": FORGOTTEN, "plan_first": f"{TOO_EARLY} .wq, wk, wv, wo are DTensors"}
KV_HEADS = "num_kv_heads=1 cannot be divided among tensor_parallel_size=2 ranks"
ONE_KV_HEAD = {
    "examples.custom_models.qwen3_torchtitan:build_qwen3_torchtitan": KV_HEADS,
    "examples.custom_models.megatron_gpt:build_megatron_model": (
        "cannot split num_key_value_heads=1 over tensor_parallel_size=2"
    ),
    "tests.dist.dtensor_plan:by_context": KV_HEADS,
}


@pytest.mark.parametrize("factory", QWEN3)
def test_a_wrong_order_is_named(factory, tmp_path):
    checkpoint = qwen3_checkpoint(tmp_path / "checkpoint", num_hidden_layers=1)
    assert_refused(f"tests.dist.wrong_orders:{factory}", checkpoint, QWEN3[factory])


@pytest.mark.parametrize("factory", DEEPSEEK)
def test_a_wrong_order_with_latent_attention_is_named(factory, tmp_path):
    checkpoint = deepseek_v3_checkpoint(tmp_path / "checkpoint", num_hidden_layers=1)
    assert_refused(f"tests.dist.wrong_orders:{factory}", checkpoint, DEEPSEEK[factory])


@pytest.mark.parametrize("factory", PLAIN)
def test_a_wrong_order_of_a_users_plan_is_named(factory, my_checkpoint):
    assert_refused(f"tests.dist.wrong_orders:{factory}", my_checkpoint, PLAIN[factory])


def test_logits_of_one_ranks_vocabulary_are_named_with_the_fix(my_checkpoint):
    for refusal in refusals("tests.dist.wrong_orders:plan_ungathered", my_checkpoint):
        assert "compute_logits returned (1, 128) for 1 token; expected (1, 256)" in refusal, refusal
        assert "gather the output of the head (ColwiseParallel(output_layouts=" in refusal, refusal


@pytest.mark.parametrize("target", ONE_KV_HEAD)
def test_fewer_kv_heads_than_ranks_are_named(target, my_checkpoint, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    if "dtensor_plan" in target:
        shutil.copytree(my_checkpoint, checkpoint)
        config = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 1}))
    else:
        qwen3_checkpoint(checkpoint, num_hidden_layers=1, num_key_value_heads=1)
    assert_refused(target, checkpoint, ONE_KV_HEAD[target])


def test_query_heads_that_the_ranks_cannot_share_are_named(tmp_path):
    """By vLLM, from the configuration, before it calls any factory."""
    target = next(iter(ONE_KV_HEAD))
    sizes = {"num_attention_heads": 3, "num_key_value_heads": 3}
    checkpoint = qwen3_checkpoint(tmp_path / "checkpoint", num_hidden_layers=1, **sizes)
    for refusal in refusals(target, checkpoint):
        assert "Total number of attention heads (3) must be divisible by" in refusal, refusal
        assert "tensor parallel size (2)" in refusal and ORDER in refusal


def assert_refused(target, checkpoint, reason):
    """Every rank says the reason and the right order, and none serves."""
    for refusal in refusals(target, checkpoint):
        assert re.search(reason, refusal) and ORDER in refusal, refusal


def refusals(target, checkpoint, **options):
    """What each of two ranks says when it refuses to serve with these options of the engine."""
    arguments = (target, str(checkpoint), json.dumps(options))
    printed = torchrun(2, "tests.dist.refusal_worker", *arguments)
    said = printed.split("REFUSED")[1:]
    assert len(said) == 2 and "SERVED" not in printed
    return said
