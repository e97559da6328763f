"""`vllm-graft doctor` as a command: a healthy port, a faulty one, and one that cannot be run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.moe_checkpoints import deepseek_v3_checkpoint
from tests.support import ROOT, qwen3_checkpoint, spread_weights
from tests.zoo.test_handwritten import LearnedPositions
from tests.zoo.test_transformers import GPT2

pytestmark = pytest.mark.engine
FACTORY = "transformers:AutoModelForCausalLM.from_config"
FAULTY = """
from transformers import AutoModelForCausalLM

def build(config):
    model = AutoModelForCausalLM.from_config(config)
    for layer in model.model.layers:
        layer.input_layernorm.variance_epsilon = 1e-2
    return model
"""
PATHS = [
    ("training forward", 195), ("prefill", 195), ("chunked prefill", 195),
    ("prefix cache, 128 tokens", 3), ("decode", 24), ("mixed batch", 24),
    ("after a weight update", 195), ("after export and reload", 195),
]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return qwen3_checkpoint(tmp_path_factory.mktemp("qwen3"))


def command(folder, *arguments):
    code = "from vllm_graft.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, "doctor", *map(str, arguments)],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_healthy_port_exits_0_and_every_path_was_compared(checkpoint, tmp_path):
    done = command(tmp_path, checkpoint, "--factory", FACTORY, "--json", "report.json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["healthy"] is True
    assert len(report["gradients"]) == 2 + 3 * 9
    assert [(each["path"], each["tokens"]) for each in report["paths"]] == PATHS
    assert report["left_out"] == []


def test_faulty_port_exits_1_with_place_and_fault(checkpoint, tmp_path):
    (tmp_path / "faulty.py").write_text(FAULTY)
    files = ("--json", "report.json", "--html", "report.html")
    done = command(tmp_path, checkpoint, "--factory", "faulty.py:build", *files)
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["diagnoses"][0]["fault"] == "wrong norm eps"
    assert "layers.0.self_attn" in done.stdout
    assert "wrong norm eps" in (tmp_path / "report.html").read_text()


def test_port_that_cannot_be_built_exits_2(checkpoint, tmp_path):
    (tmp_path / "none.py").write_text("def build(vllm_config, parallel_context): return None\n")
    done = command(tmp_path, checkpoint, "--factory", "none.py:build")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr.splitlines()[-1]


ORIGINAL = """
from tests.zoo.test_handwritten import LearnedPositions

def build(config):
    return LearnedPositions()
"""


def test_a_model_without_a_twin_is_compared_with_itself_untouched(tmp_path):
    from safetensors.torch import save_file
    from transformers import GPT2Config

    model = spread_weights(LearnedPositions())
    GPT2Config(**GPT2).save_pretrained(tmp_path / "own")
    tensors = {n: t.clone() for n, t in model.state_dict().items() if n != "lm_head.weight"}
    save_file(tensors, tmp_path / "own" / "model.safetensors")
    (tmp_path / "own_model.py").write_text(ORIGINAL)
    arguments = ("own", "--factory", "own_model.py:build")
    done = command(tmp_path, *arguments, "--reference", "original", "--json", "report.json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["reference"], len(report["paths"])) == ("original", 8)
    twin = command(tmp_path, *arguments)
    assert twin.returncode == 2 and "Use --reference original" in twin.stderr


def test_against_stock_vllm_a_healthy_port_exits_0_and_says_what_was_left_out(checkpoint, tmp_path):
    files = ("--json", "report.json")
    done = command(tmp_path, checkpoint, "--arch", "Qwen3TorchTitan", "--reference", "vllm", *files)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["reference"], report["healthy"], report["gradients"]) == ("vllm", True, [])
    assert [(each["path"], each["tokens"]) for each in report["paths"]] == PATHS
    assert [each["what"] for each in report["left_out"]] == ["layers", "gradients", "diagnosis"]
    assert "Left out: gradients: as a reference, vllm gives log-probabilities only" in done.stdout


def test_against_stock_vllm_a_faulty_port_exits_1(checkpoint, tmp_path):
    (tmp_path / "faulty.py").write_text(FAULTY)
    arguments = ("--factory", "faulty.py:build", "--reference", "vllm", "--json", "report.json")
    done = command(tmp_path, checkpoint, *arguments)
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    # The eps is too large on every path, by far more than the limit of 1e-4 nats.
    assert all(each["max_difference"] > 1e-2 for each in report["paths"])


@pytest.mark.slow
def test_against_stock_vllm_latent_attention_agrees_too(tmp_path):
    deepseek_v3_checkpoint(tmp_path / "own")
    arguments = ("own", "--arch", "DeepSeekV3TorchTitan", "--reference", "vllm")
    done = command(tmp_path, *arguments, "--json", "report.json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    absent = [each["what"] for each in report["left_out"]]
    assert absent[-3:] == ["layers", "gradients", "diagnosis"]
    # Which of the two vLLM turns off depends on the processor.
    assert len(report["paths"]) + len(absent) == 8 + 3


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("NobodysForCausalLM", "has no implementation of it"),
        ("GPTNeoXForCausalLM", "runs it by Transformers' model, not by one of its own"),
        ("Qwen3TorchTitan", "registered with Graft"),
    ],
)
def test_an_architecture_that_vllm_has_not_of_its_own_exits_2(
    architecture, reason, checkpoint, tmp_path
):
    shutil.copytree(checkpoint, tmp_path / "other")
    config = json.loads((checkpoint / "config.json").read_text())
    config["architectures"] = [architecture]
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    done = command(tmp_path, "other", "--arch", "Qwen3TorchTitan", "--reference", "vllm")
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"config.json names {architecture}" in done.stderr and reason in done.stderr
    assert "Use --reference transformers or --reference original" in done.stderr


@pytest.mark.slow
def test_compiled_and_parallel_engines_are_compared_too(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    options = ("--arch", "Qwen3TorchTitan", "--compile", "--tp", "2", "--json", "report.json")
    done = command(tmp_path, checkpoint, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    paths = {each["path"]: each["tokens"] for each in report["paths"]}
    assert (paths["torch.compile"], paths["TP=2"]) == (195, 195)
