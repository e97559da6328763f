"""`push_weights` into engines: what was sent is served, whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

import vllm_graft
from examples.custom_models.qwen3_torchtitan import (
    ARCH,
    Qwen3TorchTitanForCausalLM,
    build_qwen3_torchtitan,
)
from tests.support import (
    adapter,
    engine,
    generate,
    live_module,
    prompts,
    qwen3_checkpoint,
    sampled_logprobs,
)
from vllm_graft import WeightError, push_weights
from vllm_graft.train import push
from vllm_graft.weights.contents import Contents

pytestmark = pytest.mark.engine

UPDATES = {"dtype": "float32", "weight_transfer_config": {"backend": "graft_shm"}}
TOKENS = prompts((300, 9))


def trainer(checkpoint: Path, seed: int = 5) -> Qwen3TorchTitanForCausalLM:
    """A model outside any engine, with weights of its own."""
    config = SimpleNamespace(
        hf_config=AutoConfig.from_pretrained(checkpoint),
        model_config=SimpleNamespace(max_model_len=512),
    )
    model = Qwen3TorchTitanForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.08 if parameter.dim() > 1 else 0.3
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * spread + float(parameter.dim() == 1))
    return model


def segments() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("graft-push-*")}


@pytest.fixture(autouse=True)
def nothing_stays_in_shared_memory():
    before = segments()
    yield
    assert segments() <= before


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    vllm_graft.register(ARCH, build_qwen3_torchtitan)
    return qwen3_checkpoint(tmp_path_factory.mktemp("qwen3"), num_hidden_layers=2)


def save(checkpoint: Path, model, folder: Path) -> Path:
    """What the trainer would export."""
    shutil.copytree(checkpoint, folder)
    tensors = {name: tensor.contiguous() for name, tensor in Contents(model).tensors()}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def wanted(checkpoint, tmp_path_factory):
    """Served by an engine that was started with the trainer's weights."""
    folder = save(checkpoint, trainer(checkpoint), tmp_path_factory.mktemp("new") / "model")
    with engine(folder, ARCH, dtype="float32") as llm:
        return served(llm)


def served(llm) -> list[list[float]]:
    return [sampled_logprobs(c) for c in generate(llm, TOKENS, max_tokens=16)]


@pytest.fixture(scope="module")
def llm(checkpoint, wanted):
    """Started once the engine of `wanted` has ended: a process bears one at a time."""
    with engine(checkpoint, ARCH, enable_prefix_caching=True, **UPDATES) as running:
        yield running


def test_the_engine_serves_what_was_pushed(checkpoint, llm, wanted):
    old = served(llm)
    push_weights(trainer(checkpoint), llm)
    assert served(llm) == wanted != old


def change(edit):
    """A trainer whose weights `edit` has changed."""

    def make(checkpoint):
        model = trainer(checkpoint, seed=6)
        with torch.no_grad():
            edit(model)
        return model

    return make


def drop_a_layer(model):
    del model.model.layers["1"]


def lose_a_bias_name(model):
    model.name_mapping = {**model.name_mapping, "surplus.weight": "extra"}
    model.model.register_parameter("extra", torch.nn.Parameter(torch.zeros(3)))


def halve_the_head(model):
    head = model.model.lm_head
    head.weight = torch.nn.Parameter(head.weight[:256].clone())


def put_nan(model):
    model.model.layers["1"].attention.wo.weight[3, 5] = float("nan")


def put_inf(model):
    model.model.lm_head.weight[-1, -1] = float("inf")


REFUSED = {
    "missing": (drop_a_layer, r"the trainer lacks: model\.layers\.1\."),
    "surplus": (lose_a_bias_name, r"the engine has no: surplus\.weight"),
    "shape": (halve_the_head, r"lm_head\.weight is \(256, 128\), the engine's \(512, 128\)"),
    "nan": (put_nan, r"NaN or infinite values in model\.layers\.1\.attention\.wo\.weight"),
    "inf": (put_inf, r"NaN or infinite values in model\.lm_head\.weight"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_beforehand_leaves_the_old_weights(checkpoint, llm, case):
    edit, message = REFUSED[case]
    before = served(llm)
    with pytest.raises(WeightError, match=message):
        push_weights(change(edit)(checkpoint), llm)
    assert served(llm) == before


def break_at(monkeypatch, count: int, error: BaseException) -> None:
    """Let the sender fail with its tensor number `count`, in chunks of 64 KiB."""
    calls = iter(range(count))
    stock = push.digest

    def digest(tensor):
        if next(calls, None) is None:
            raise error
        return stock(tensor)

    monkeypatch.setattr(push, "digest", digest)
    monkeypatch.setattr(push, "CHUNK", 1 << 16)


@pytest.mark.parametrize("error", [OSError("disk on fire"), KeyboardInterrupt()], ids=repr)
def test_a_push_that_breaks_off_is_never_served(checkpoint, llm, wanted, monkeypatch, error):
    with monkeypatch.context() as patched:
        break_at(patched, 15, error)
        with pytest.raises(type(error)):
            push_weights(trainer(checkpoint, seed=7), llm)
    for _ in range(2):
        with pytest.raises(WeightError, match="refuses to serve"):
            served(llm)
    assert_refuses(llm)
    push_weights(trainer(checkpoint), llm)
    assert served(llm) == wanted


def assert_refuses(llm) -> None:
    """The worker itself refuses, whoever asks."""
    with pytest.raises(WeightError, match="refuses to serve"):
        adapter(llm)(torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))


def test_a_sender_that_vanishes_is_never_served_and_the_next_push_takes_over(
    checkpoint, llm, wanted, monkeypatch
):
    with monkeypatch.context() as patched:
        break_at(patched, 15, KeyboardInterrupt())
        patched.setattr(push._Sender, "abandon", lambda self, reason: None)
        with pytest.raises(KeyboardInterrupt):
            push_weights(trainer(checkpoint, seed=7), llm)
    assert_refuses(llm)
    with pytest.raises(WeightError, match="refuses to serve: a push of weights is not complete"):
        served(llm)
    push_weights(trainer(checkpoint), llm)
    assert served(llm) == wanted


def test_other_bytes_on_the_way_are_never_served(checkpoint, llm, wanted, monkeypatch):
    stock = push.digest
    with monkeypatch.context() as patched:
        patched.setattr(push, "digest", lambda tensor: stock(tensor) ^ int(tensor.dim() == 1))
        with pytest.raises(WeightError, match=r"9 tensors of the engine are not.*layernorm"):
            push_weights(trainer(checkpoint, seed=7), llm)
    with pytest.raises(WeightError, match="refuses to serve"):
        served(llm)
    assert_refuses(llm)
    push_weights(trainer(checkpoint), llm)
    assert served(llm) == wanted


def test_a_trainer_in_another_dtype_sends_what_the_engine_holds(checkpoint, llm):
    model = trainer(checkpoint).to(torch.float64)
    push_weights(model, llm)
    for (name, mine), theirs in zip(
        model.named_parameters(), live_module(llm).parameters(), strict=True
    ):
        assert torch.equal(mine.float(), theirs), name


def test_requests_in_flight_are_refused(checkpoint, llm):
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=2, detokenize=False)
    llm.llm_engine.add_request("0", {"prompt_token_ids": [1, 2, 3]}, params)
    with pytest.raises(WeightError, match="1 requests are in flight"):
        push_weights(trainer(checkpoint), llm)
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    push_weights(trainer(checkpoint), llm)


def test_targets_that_take_no_weights_say_why(checkpoint):
    with pytest.raises(TypeError, match=r"target is a int; expected a vllm\.LLM"):
        push_weights(trainer(checkpoint), 3)
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:9/v1/graft/weights"):
        push_weights(trainer(checkpoint), "http://127.0.0.1:9")
