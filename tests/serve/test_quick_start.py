"""The Custom Model API's Quick Start, in this process, in spawned workers and in a server."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from tests.serve.conftest import LIBRARY, greedy
from tests.support import ROOT, engine, generate, live_module, prompts, python

pytestmark = pytest.mark.engine


@pytest.fixture
def registered(my_library):
    import quick_start
    from vllm.model_executor.models import ModelRegistry

    ModelRegistry.register_model("MyCustomModel", quick_start.build_my_custom_model)


def test_it_gives_the_originals_tokens_far_beyond_the_sliced_table(
    registered, my_model, my_checkpoint
):
    """The model takes [B, L], slices its RoPE table by L and knows no positions."""
    tokens = prompts((1, 4, 60, 200, 300), vocab_size=256)
    want = [greedy(my_model, prompt, 20) for prompt in tokens]
    with engine(my_checkpoint, dtype="float32") as llm:
        got = [list(c.token_ids) for c in generate(llm, tokens, max_tokens=20)]
        assert got == want
        # Dropout never reaches serving, and the flag is given back.
        live_module(llm).train()
        assert [list(c.token_ids) for c in generate(llm, tokens, max_tokens=20)] == want
        assert live_module(llm).model.layers[0].dropout.training


def test_tables_are_right_under_a_bf16_engine(registered, my_model, my_checkpoint):
    """vLLM builds with bf16 as the default dtype, in which the table would be garbage."""
    import torch

    with engine(my_checkpoint, dtype="bfloat16") as llm:
        model = live_module(llm).model
        assert torch.equal(model.freqs_cis, my_model.freqs_cis)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


SPAWNED = """
import sys
sys.path.append(sys.argv[1])
if __name__ == "__main__":
    import quick_start
    from vllm import LLM, SamplingParams
    llm = LLM(sys.argv[2], dtype="float32", max_model_len=256, skip_tokenizer_init=True,
              enforce_eager=True)
    sampling = SamplingParams(temperature=0.0, max_tokens=8, detokenize=False, ignore_eos=True)
    out = llm.generate([{"prompt_token_ids": [1, 2, 3]}], sampling)
    print("TOKENS", list(out[0].outputs[0].token_ids))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting", [{}, {"VLLM_PLUGINS": "none_of_ours", "VLLM_TARGET_DEVICE": "cpu"}]
)
def test_it_works_with_spawned_processes(my_model, my_checkpoint, setting):
    done = python(
        SPAWNED, str(LIBRARY), str(my_checkpoint), VLLM_ENABLE_V1_MULTIPROCESSING="1", **setting
    )
    assert f"TOKENS {greedy(my_model, [1, 2, 3], 8)}" in done.stdout, done.stderr[-3000:]


def post(port: int, path: str, body: dict) -> dict:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@pytest.fixture
def server(my_checkpoint):
    """The OpenAI server on a free loopback port, started by `vllm-graft serve --factory`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm_graft.cli", "serve", str(my_checkpoint)]
    command += ["--factory", f"{LIBRARY}/quick_start.py:build_my_custom_model"]
    command += ["--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--skip-tokenizer-init", "--max-model-len", "256"]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        yield port
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.mark.slow
def test_it_serves_openai_completions(server, my_model, my_checkpoint):
    body = {
        "model": str(my_checkpoint),
        "prompt": [1, 2, 3],
        "temperature": 0,
        "max_tokens": 8,
        "ignore_eos": True,
        "return_token_ids": True,
        "detokenize": False,
    }
    [choice] = post(server, "/v1/completions", body)["choices"]
    assert choice["token_ids"] == greedy(my_model, [1, 2, 3], 8)
