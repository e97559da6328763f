"""`push_weights` where trainer and engine are processes of their own."""

from __future__ import annotations

import json
import sys
import threading
import time
import urllib.request
from pathlib import Path
from urllib.error import HTTPError

import openai
import pytest

import vllm_graft
from examples.custom_models.qwen3_torchtitan import ARCH, build_qwen3_torchtitan
from tests.dist.launch import torchrun
from tests.serve.test_cli_serve import free_port, served, wait_until_up, with_tokenizer
from tests.serve.test_push import break_at, save, segments, trainer
from tests.support import engine, generate, python, qwen3_checkpoint
from vllm_graft import WeightError, push_weights

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

KEY = "sesame"
PROMPTS = [list(range(2, 202)), [7, 8, 9]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = qwen3_checkpoint(tmp_path_factory.mktemp("qwen3"), num_hidden_layers=2)
    return with_tokenizer(folder)


@pytest.fixture(scope="module")
def wanted(checkpoint, tmp_path_factory):
    """The tokens of an engine that was started with the trainer's weights."""
    vllm_graft.register(ARCH, build_qwen3_torchtitan)
    folder = save(checkpoint, trainer(checkpoint), tmp_path_factory.mktemp("new") / "model")
    with engine(folder, ARCH, dtype="float32") as llm:
        return [list(c.token_ids) for c in generate(llm, PROMPTS, max_tokens=16)]


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def server(request, checkpoint, wanted, tmp_path_factory):
    """A server that takes weights and wants a key: its URL, and a client that has it."""
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "vllm_graft.cli", "serve", str(checkpoint), "--arch", ARCH]
    command += ["--weight-updates", "--api-key", KEY, "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "512", "--enforce-eager", "--served-model-name", "tiny"]
    command += ["--tensor-parallel-size", str(request.param)]
    url = f"http://127.0.0.1:{port}"
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(map(str, range(request.param))))
        with served(command, log) as process:
            wait_until_up(process, client, log)
            yield url, client
    assert not segments()


def tokens(client: openai.OpenAI, max_tokens: int = 16) -> list[list[int]]:
    """The server's greedy continuations."""
    made = client.completions.create(
        model="tiny",
        prompt=PROMPTS,
        max_tokens=max_tokens,
        temperature=0.0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    return [choice.token_ids for choice in made.choices]


@pytest.mark.parametrize("kind", ["fsdp", "tensor_parallel"])
def test_ranks_push_into_a_server(kind, server, checkpoint, wanted, monkeypatch):
    url, client = server
    push_weights(trainer(checkpoint, seed=9), url, api_key=KEY)
    old = tokens(client)
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    said = torchrun(2, "tests.serve.push_worker", kind, str(checkpoint), url)
    assert tokens(client) == wanted != old
    assert "RANK 1 NaN or infinite values in model.tok_embeddings.weight" in said
    assert "RANK 0 rank 1: NaN or infinite values in model.tok_embeddings.weight" in said


def test_routes_want_the_key_and_json(server):
    url, _ = server

    def status(headers, body=b"{}") -> int:
        request = urllib.request.Request(f"{url}/v1/graft/weights/describe", body, headers)
        with pytest.raises(HTTPError) as caught:
            urllib.request.urlopen(request)
        return caught.value.code

    assert status({}) == 401
    assert status({"Authorization": "Bearer guess"}) == 401
    assert status({"Authorization": f"Bearer {KEY}"}, b"\x80\x04N.") == 409  # a pickle


def test_a_wrong_key_is_named(server, checkpoint):
    with pytest.raises(WeightError, match="the server wants its API key"):
        push_weights(trainer(checkpoint), server[0], api_key="guess")


def test_a_broken_push_is_answered_503_until_a_whole_one(server, checkpoint, wanted, monkeypatch):
    url, client = server
    with monkeypatch.context() as patched:
        break_at(patched, 15, OSError("disk on fire"))
        with pytest.raises(OSError, match="disk on fire"):
            push_weights(trainer(checkpoint, seed=7), url, api_key=KEY)
    for _ in range(2):
        with pytest.raises(openai.InternalServerError, match="disk on fire") as caught:
            tokens(client)
        assert caught.value.status_code == 503
    push_weights(trainer(checkpoint), url, api_key=KEY)
    assert tokens(client) == wanted


def test_a_killed_sender_leaves_no_segment_and_the_next_push_takes_over(
    server, checkpoint, wanted, monkeypatch
):
    url, client = server
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    with pytest.raises(AssertionError):
        torchrun(2, "tests.serve.push_worker", "fsdp", str(checkpoint), url, "15")
    deadline = time.monotonic() + 20
    while segments() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not segments()
    made: list[list[list[int]]] = []
    waiting = threading.Thread(target=lambda: made.append(tokens(client)))
    waiting.start()
    time.sleep(2)
    assert not made, "a mixture was served"
    push_weights(trainer(checkpoint), url, api_key=KEY)
    waiting.join(60)
    assert made == [wanted]


def test_requests_in_flight_go_on_with_the_new_weights(server, checkpoint, wanted):
    url, client = server
    push_weights(trainer(checkpoint, seed=8), url, api_key=KEY)
    made: list[list[list[int]]] = []
    running = threading.Thread(target=lambda: made.append(tokens(client, max_tokens=200)))
    before = tokens(client)
    running.start()
    time.sleep(0.5)
    push_weights(trainer(checkpoint), url, api_key=KEY)
    running.join(120)
    [long] = made
    assert [len(answer) for answer in long] == [200, 200]
    assert [answer[:2] for answer in long] == [answer[:2] for answer in before]
    assert tokens(client) == wanted


CODE = """
import json, os, sys
from pathlib import Path
import vllm_graft
from tests.serve.test_push import trainer
from tests.support import generate
from vllm_graft import WeightError, push_weights
if __name__ == "__main__":
    factory = "vllm_graft.examples.qwen3_torchtitan:build_qwen3_torchtitan"
    vllm_graft.register("Qwen3TorchTitan", factory)
    from vllm import LLM
    llm = LLM(sys.argv[1], hf_overrides={"architectures": ["Qwen3TorchTitan"]}, dtype="float32",
              tensor_parallel_size=2, enforce_eager=True, max_model_len=512, disable_log_stats=True,
              skip_tokenizer_init=True, weight_transfer_config={"backend": "graft_shm"})
    prompts = json.loads(sys.argv[2])
    generate(llm, prompts, max_tokens=2)
    from vllm_graft.train import push
    stock, push.digest = push.digest, lambda tensor: 1
    try:
        push_weights(trainer(Path(sys.argv[1]), seed=7), llm)
    except WeightError as error:
        print("REFUSED", error)
    try:
        generate(llm, prompts)
    except WeightError as error:
        print("REFUSED", error)
    push.digest = stock
    push_weights(trainer(Path(sys.argv[1])), llm)
    made = generate(llm, prompts, max_tokens=16)
    print("TOKENS", json.dumps([list(c.token_ids) for c in made]))
"""


def test_an_engine_of_worker_processes_takes_weights_and_outlives_a_refusal(
    checkpoint, wanted, tmp_path
):
    script = tmp_path / "push.py"
    script.write_text(CODE)
    done = python(
        "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')",
        str(script), str(checkpoint), json.dumps(PROMPTS),
        VLLM_ENABLE_V1_MULTIPROCESSING="1", VLLM_CPU_OMP_THREADS_BIND="0|1",
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if "TOKENS" in line]
    assert lines, done.stderr[-4000:]
    assert json.loads(lines[0].split("TOKENS ")[1]) == wanted
    assert "tensors of the engine are not those that were sent" in done.stdout
    assert "refuses to serve" in done.stdout
    assert not {path.name for path in Path("/dev/shm").glob("graft-push-*")}
