"""`vllm-graft serve` as a user runs it: a process, a port, the `openai` client, and a clean end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import openai
import psutil
import pytest

from vllm_graft import WeightError
from vllm_graft.train.targets import ROUTE, Server

pytestmark = [pytest.mark.slow, pytest.mark.engine, pytest.mark.timeout(400)]

START_S = 300
END_S = 60


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 with a word-level tokenizer."""
    from vllm_graft.bench.shapes import write_checkpoint

    folder = tmp_path_factory.mktemp("tiny_qwen3")
    write_checkpoint("tiny", folder)
    return with_tokenizer(folder)


def with_tokenizer(folder: Path) -> Path:
    """Add a tokenizer whose word `w7` is token 7."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, 512)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<eos>",
    ).save_pretrained(folder)
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def served(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run the server in a process group of its own, and kill what is left of it at the end."""
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, stdout=sink, stderr=sink, env=env, start_new_session=True
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until_up(process: subprocess.Popen[bytes], client: openai.OpenAI, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"the server ended with {process.returncode}:\n{log.read_text()[-3000:]}")
        try:
            client.models.list()
            return
        except openai.APIConnectionError:
            time.sleep(1)
    pytest.fail(f"no answer after {START_S} s:\n{log.read_text()[-3000:]}")


def listening_addresses(process: psutil.Process) -> set[str]:
    family = [process, *process.children(recursive=True)]
    connections = [c for member in family for c in member.net_connections("tcp")]
    return {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}


def test_openai_client_gets_a_completion_and_nothing_is_left(
    checkpoint: Path, tmp_path: Path
) -> None:
    port, log = free_port(), tmp_path / "server.log"
    command = [sys.executable, "-m", "vllm_graft.cli", "serve", str(checkpoint)]
    command += ["--arch", "Qwen3TorchTitan", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "128", "--enforce-eager", "--served-model-name", "tiny"]
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    with served(command, log) as process:
        wait_until_up(process, client, log)
        completion = client.completions.create(
            model="tiny", prompt="w3 w5 w7", max_tokens=4, temperature=0.0
        )
        assert completion.usage is not None
        assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (3, 4)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}{ROUTE}/start", b"{}")
        with pytest.raises(WeightError, match="takes no weights.*--weight-updates"):
            Server(f"http://127.0.0.1:{port}", None).call("start", {})
        assert listening_addresses(psutil.Process(process.pid)) == {"127.0.0.1"}

        family = psutil.Process(process.pid).children(recursive=True)
        assert family, "vLLM's engine core runs in a child process"
        process.send_signal(signal.SIGTERM)
        process.wait(END_S)
        _, alive = psutil.wait_procs(family, timeout=END_S)
        assert alive == []
