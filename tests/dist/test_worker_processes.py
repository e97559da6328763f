"""`LLM(tensor_parallel_size=2)` with vLLM's own worker processes gives one rank's tokens."""

from __future__ import annotations

import json

import pytest

import vllm_graft
from examples.custom_models.qwen3_torchtitan import ARCH, build_qwen3_torchtitan
from tests.support import engine, generate, prompts, python, qwen3_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.slow]

CODE = """
import json, sys
import vllm_graft
from tests.support import engine, generate
if __name__ == "__main__":
    vllm_graft.register("Qwen3TorchTitan", "vllm_graft.examples.qwen3_torchtitan:build_qwen3_torchtitan")
    from vllm import LLM
    llm = LLM(sys.argv[1], hf_overrides={"architectures": ["Qwen3TorchTitan"]}, dtype="float32",
              tensor_parallel_size=2, enforce_eager=True, max_model_len=512,
              skip_tokenizer_init=True, disable_log_stats=True)
    made = generate(llm, json.loads(sys.argv[2]), max_tokens=16)
    print("TOKENS", json.dumps([list(c.token_ids) for c in made]))
"""


def test_workers_shard_and_serve(tmp_path):
    checkpoint, tokens = qwen3_checkpoint(tmp_path / "checkpoint"), prompts((3, 40, 130))
    vllm_graft.register(ARCH, build_qwen3_torchtitan)
    with engine(checkpoint, ARCH, dtype="float32") as llm:
        alone = [list(c.token_ids) for c in generate(llm, tokens, max_tokens=16)]
    script = tmp_path / "serve.py"
    script.write_text(CODE)
    done = python(
        f"import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path({str(script)!r}, run_name='__main__')",
        str(script), str(checkpoint), json.dumps(tokens),
        VLLM_ENABLE_V1_MULTIPROCESSING="1", VLLM_CPU_OMP_THREADS_BIND="0|1",
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if "TOKENS" in line]
    assert lines, done.stderr[-4000:]
    assert json.loads(lines[0].split("TOKENS ")[1]) == alone
