"""A wheel install works like the editable one: hook, API path, built-in architecture, children."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.support import ROOT, qwen3_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.engine]

SERVE = """
import sys
if __name__ == "__main__":
    import vllm_graft
    from vllm import LLM, SamplingParams
    vllm_graft.register("Wheel", "vllm_graft.examples.qwen3_torchtitan:build_qwen3_torchtitan")
    llm = LLM(sys.argv[1], dtype="float32", max_model_len=128, skip_tokenizer_init=True,
              enforce_eager=True, hf_overrides={"architectures": ["Wheel"]})
    sampling = SamplingParams(temperature=0.0, max_tokens=4, detokenize=False, ignore_eos=True)
    out = llm.generate([{"prompt_token_ids": [1, 2, 3]}], sampling)
    print("SERVED", len(out[0].outputs[0].token_ids), vllm_graft.__file__)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """A new environment with the wheel; the dependencies are those of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", folder, ROOT)
    run(sys.executable, "-m", "venv", folder / "env")
    wheel = next(folder.glob("*.whl"))
    run(folder / "env/bin/pip", "install", "--quiet", "--no-deps", "--no-index", wheel)
    site = next((folder / "env/lib").glob("python*/site-packages"))
    # A plain path: the start-up lines of that folder, our editable install's too, do not run.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "env"


def run(*command: object, **env: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd="/",
        env={**os.environ, "PYTHONPATH": "", **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("setting", [{}, {"VLLM_TARGET_DEVICE": "cpu"}, {"VLLM_PLUGINS": "other"}])
def test_the_api_path_works_in_a_fresh_interpreter(environment, setting):
    code = (
        "from vllm.model_executor.custom_models import TrainableFlashAttention as A\n"
        "import vllm_graft; print(A is vllm_graft.TrainableFlashAttention, vllm_graft.__file__)"
    )
    same, where = run(environment / "bin/python", "-c", code, **setting).split()[-2:]
    assert same == "True" and where.startswith(str(environment))


def test_kernels_come_with_their_source(environment):
    [package] = (environment / "lib").glob("python*/site-packages/vllm_graft")
    assert (package / "kernels/packed_bf16.cpp").is_file()


def test_the_command_line_lists_the_built_in_architecture(environment):
    assert "Qwen3TorchTitan" in run(environment / "bin/vllm-graft", "list", "--json")


def test_spawned_processes_find_the_model(environment, tmp_path):
    script = tmp_path / "serve.py"
    script.write_text(SERVE)
    checkpoint = qwen3_checkpoint(tmp_path / "checkpoint", num_hidden_layers=1)
    out = run(environment / "bin/python", script, checkpoint, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    assert f"SERVED 4 {environment}" in out
