"""Servers on two ranks or two stages: the tokens of one, and an end when a worker dies."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from examples.custom_models.qwen3_torchtitan import ARCH
from tests.dist.test_lifetimes import assert_all_end, members, started_by
from tests.dist.test_worker_processes import MODELS, of_one_rank
from tests.serve.test_cli_serve import free_port, served, wait_until_up, with_tokenizer
from tests.support import prompts, qwen3_checkpoint
from vllm_graft.serve.registry import BUILT_IN

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PROMPTS = prompts((1, 17, 40, 130))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokenizer(qwen3_checkpoint(tmp_path_factory.mktemp("cli") / "checkpoint"))


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> list[list[int]]:
    return of_one_rank(checkpoint, ARCH, PROMPTS)


def ask(client: openai.OpenAI) -> list[list[int]]:
    """The server's tokens for all prompts in one request."""
    completion: Any = client.completions.create(
        model="tiny", prompt=PROMPTS, max_tokens=16, temperature=0.0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )  # fmt: skip
    return [choice.token_ids for choice in completion.choices]


def client_of(port: int) -> tuple[openai.OpenAI, list[str]]:
    """A client, and the options of the server that it will ask."""
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    where = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny"]
    return client, [*where, "--dtype", "float32", "--max-model-len", "512"]


@pytest.mark.parametrize("model", ["deepseek v3", "megatron"])
def test_vllms_own_server_shards_what_the_environment_names(model, tmp_path, monkeypatch):
    arch, make, _ = MODELS[model]
    checkpoint, log = with_tokenizer(make(tmp_path / "checkpoint")), tmp_path / "server.log"
    alone = of_one_rank(checkpoint, arch, PROMPTS)
    monkeypatch.setenv("VLLM_GRAFT_MODELS", json.dumps({arch: BUILT_IN[arch]}))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    client, where = client_of(free_port())
    # `vllm serve` runs this module; on CPU it looks for a package `vllm` and finds `vllm-cpu`.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *where]
    command += ["--model", str(checkpoint), "--hf-overrides", json.dumps({"architectures": [arch]})]
    command += ["--tensor-parallel-size", "2", "--enforce-eager"]
    with served(command, log) as server:
        wait_until_up(server, client, log)
        assert ask(client) == alone


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
    log = tmp_path / "server.log"
    client, where = client_of(free_port())
    command = [sys.executable, "-m", "vllm_graft.cli", "serve", str(checkpoint), "--arch", ARCH]
    command += [*where, f"--{axis}-parallel-size", "2", *mode]
    with served(command, log) as server:
        wait_until_up(server, client, log)
        assert ask(client) == alone
        everyone = started_by(server)
        members(server, worker)[0].kill()
        assert_all_end([psutil.Process(server.pid), *everyone])
    assert "Worker proc VllmWorker-1 died unexpectedly (exit code: -9)" in log.read_text()
