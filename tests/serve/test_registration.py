"""Factories of every kind reach the processes that need them, or are refused with the fix."""

from __future__ import annotations

import textwrap

import pytest

import vllm_graft
from examples.custom_models.qwen3_torchtitan import Qwen3TorchTitanForCausalLM
from tests.support import ROOT, engine, generate, python, qwen3_checkpoint

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return qwen3_checkpoint(tmp_path_factory.mktemp("qwen3"), num_hidden_layers=1)


def served(checkpoint, arch: str) -> list[int]:
    with engine(checkpoint, arch, dtype="float32") as llm:
        return list(generate(llm, [[1, 2, 3]], max_tokens=4)[0].token_ids)


def test_every_kind_of_factory_works_in_this_process(checkpoint):
    path = "examples.custom_models.qwen3_torchtitan"
    kinds = {
        "lambda": lambda config, context: Qwen3TorchTitanForCausalLM(config, context),
        "class": Qwen3TorchTitanForCausalLM,
        "import string": f"{path}:build_qwen3_torchtitan",
        "file": str(ROOT / "examples/custom_models/qwen3_torchtitan.py:build_qwen3_torchtitan"),
    }
    tokens = set()
    for number, factory in enumerate(kinds.values()):
        vllm_graft.register(f"Kind{number}", factory)
        tokens.add(tuple(served(checkpoint, f"Kind{number}")))
    assert len(tokens) == 1


def test_stock_classes_and_strings_still_work(checkpoint):
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

    ModelRegistry.register_model("StockClass", Qwen3ForCausalLM)
    ModelRegistry.register_model("StockString", "vllm.model_executor.models.qwen3:Qwen3ForCausalLM")
    assert served(checkpoint, "StockClass") == served(checkpoint, "StockString")
    with pytest.raises(TypeError, match="should be a string or PyTorch model class"):
        ModelRegistry.register_model("Nonsense", 5)


def test_a_lambda_is_refused_before_child_processes_start(checkpoint, monkeypatch):
    vllm_graft.register("OnlyHere", lambda config, context: None)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(ValueError, match="OnlyHere.*VLLM_ENABLE_V1_MULTIPROCESSING=0"):
        served(checkpoint, "OnlyHere")


MAIN_SCRIPT = """
import sys
from examples.custom_models.qwen3_torchtitan import Qwen3TorchTitanForCausalLM

def build(vllm_config, parallel_context):
    return Qwen3TorchTitanForCausalLM(vllm_config, parallel_context)

if __name__ == "__main__":
    import vllm_graft
    from vllm import LLM, SamplingParams
    vllm_graft.register("FromMain", build)
    llm = LLM(sys.argv[1], dtype="float32", max_model_len=256, skip_tokenizer_init=True,
              enforce_eager=True, hf_overrides={"architectures": ["FromMain"]})
    sampling = SamplingParams(temperature=0.0, max_tokens=4, detokenize=False, ignore_eos=True)
    out = llm.generate([{"prompt_token_ids": [1, 2, 3]}], sampling)
    print("TOKENS", list(out[0].outputs[0].token_ids))
"""


@pytest.mark.slow
def test_a_factory_of_the_main_script_reaches_spawned_processes(checkpoint, tmp_path):
    script = tmp_path / "main_script.py"
    script.write_text(textwrap.dedent(MAIN_SCRIPT))
    run = "import runpy, sys; sys.argv = sys.argv[1:]; import subprocess; "
    run += "sys.exit(subprocess.run([sys.executable, *sys.argv]).returncode)"
    done = python(
        run, str(script), str(checkpoint), VLLM_ENABLE_V1_MULTIPROCESSING="1", PYTHONPATH=str(ROOT)
    )
    vllm_graft.register("Here", Qwen3TorchTitanForCausalLM)
    assert f"TOKENS {served(checkpoint, 'Here')}" in done.stdout, done.stderr[-3000:]
