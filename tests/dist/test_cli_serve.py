"""`vllm-graft serve` on two ranks or two stages: the tokens of one, and an end when a worker dies."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

import vllm_graft
from examples.custom_models.qwen3_torchtitan import ARCH, build_qwen3_torchtitan
from tests.dist.test_lifetimes import assert_all_end, members, started_by
from tests.serve.test_cli_serve import free_port, served, wait_until_up, with_tokenizer
from tests.support import engine, generate, prompts, qwen3_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PROMPTS = prompts((1, 17, 40, 130))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokenizer(qwen3_checkpoint(tmp_path_factory.mktemp("cli") / "checkpoint"))


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> list[list[int]]:
    """The tokens of one eager rank."""
    vllm_graft.register(ARCH, build_qwen3_torchtitan)
    with engine(checkpoint, ARCH, dtype="float32") as llm:
        return [list(c.token_ids) for c in generate(llm, PROMPTS, max_tokens=16)]


def ask(client: openai.OpenAI) -> list[list[int]]:
    """The server's tokens for all prompts in one request."""
    completion: Any = client.completions.create(
        model="tiny", prompt=PROMPTS, max_tokens=16, temperature=0.0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )  # fmt: skip
    return [choice.token_ids for choice in completion.choices]


@pytest.mark.parametrize(
    ("axis", "worker", "mode"),
    [
        ("tensor", "VLLM::Worker_TP1", ["--enforce-eager"]),
        ("tensor", "VLLM::Worker_TP1", []),
        ("pipeline", "VLLM::Worker_PP1", ["--enforce-eager"]),
        ("pipeline", "VLLM::Worker_PP1", []),
    ],
    ids=["tensor eager", "tensor compiled", "pipeline eager", "pipeline compiled"],
)
def test_two_workers_answer_as_one(axis, worker, mode, checkpoint, alone, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    port, log = free_port(), tmp_path / "server.log"
    command = [sys.executable, "-m", "vllm_graft.cli", "serve", str(checkpoint), "--arch", ARCH]
    command += ["--port", str(port), "--dtype", "float32", "--max-model-len", "512"]
    command += [f"--{axis}-parallel-size", "2", "--served-model-name", "tiny", *mode]
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    with served(command, log) as server:
        wait_until_up(server, client, log)
        assert ask(client) == alone
        everyone = started_by(server)
        members(server, worker)[0].kill()
        assert_all_end([psutil.Process(server.pid), *everyone])
    assert "Worker proc VllmWorker-1 died unexpectedly (exit code: -9)" in log.read_text()
