"""Exported ports: stock vLLM and Transformers load the folder and agree with the port."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.support import (
    ROOT,
    engine,
    generate,
    live_module,
    prompts,
    qwen3_checkpoint,
    sampled_logprobs,
)
from tests.zoo.test_transformers import original
from vllm_graft import TrainableLLM
from vllm_graft.serve.registry import register
from vllm_graft.weights.save import save_checkpoint

pytestmark = pytest.mark.engine
FACTORIES = {
    "TorchTitan": "vllm_graft.examples.qwen3_torchtitan:build_qwen3_torchtitan",
    "Transformers": "transformers:AutoModelForCausalLM.from_config",
}
TOKENS = prompts((5, 140))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("port", FACTORIES)
def test_stock_vllm_and_transformers_agree_with_the_trained_port(port, tied, tmp_path):
    from transformers import AutoModelForCausalLM

    checkpoint = qwen3_checkpoint(tmp_path / "from", tie_word_embeddings=tied)
    register(f"Exported{port}", FACTORIES[port])
    llm = TrainableLLM(
        str(checkpoint), arch=f"Exported{port}", dtype="float32", enforce_eager=True,
        max_model_len=512, skip_tokenizer_init=True,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in llm.model.parameters():
            parameter.mul_(1.05)
    served = generate(llm, TOKENS)
    save_checkpoint(llm.model, checkpoint, tmp_path / "to")
    llm.llm_engine.engine_core.shutdown()
    with engine(tmp_path / "to", dtype="float32") as stock:
        other = generate(stock, TOKENS)
    assert [c.token_ids for c in other] == [c.token_ids for c in served]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "to")
    for prompt, completion, vllms in zip(TOKENS, served, other, strict=True):
        logits = model(torch.tensor([prompt + list(completion.token_ids)])).logits[0]
        rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
        chosen = rows.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        got = torch.tensor(sampled_logprobs(completion))
        # fp32 with other kernels.
        assert (got - chosen).abs().max() < 1e-4
        assert (got - torch.tensor(sampled_logprobs(vllms))).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_stock_vllm_agrees_with_a_trained_transformers_port_of_experts(kind, tmp_path, monkeypatch):
    own = {}
    if kind == "deepseek_v3":  # The port expands keys and values; so stock vLLM does as well.
        monkeypatch.setenv("VLLM_MLA_DISABLE", "1")
        # Its own CPU kernel for RoPE errs here, see test_deepseek_v3.py.
        own = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}
    original(kind).save_pretrained(tmp_path / "from")
    register("ExportedExperts", FACTORIES["Transformers"])
    with engine(tmp_path / "from", "ExportedExperts", dtype="float32") as llm:
        module = live_module(llm)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.05)
        served = generate(llm, TOKENS, max_tokens=8)
        save_checkpoint(module, tmp_path / "from", tmp_path / "to")
    with engine(tmp_path / "to", dtype="float32", **own) as stock:
        other = generate(stock, TOKENS, max_tokens=8)
    assert [c.token_ids for c in other] == [c.token_ids for c in served]


def test_the_command_writes_what_it_read(tmp_path):
    from safetensors.torch import load_file

    checkpoint = qwen3_checkpoint(tmp_path / "from")
    done = command(checkpoint, "--arch", "Qwen3TorchTitan", "--out", tmp_path / "to")
    assert done.returncode == 0, done.stderr
    want = load_file(checkpoint / "model.safetensors")
    got = load_file(tmp_path / "to" / "model.safetensors")
    assert done.stdout.endswith(f"{len(want)} tensors\n")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    again = command(checkpoint, "--arch", "Qwen3TorchTitan", "--out", tmp_path / "to")
    assert again.returncode == 2 and "expected a new or empty folder" in again.stderr


def command(*arguments):
    code = "from vllm_graft.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, "export", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
