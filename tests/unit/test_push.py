"""Parts of `push_weights`: shared memory, comparisons, servers with silent senders."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import vllm_graft
from vllm_graft import WeightError
from vllm_graft.serve import _vllm_routes
from vllm_graft.train import push, segment
from vllm_graft.train.push import check_same
from vllm_graft.train.segment import Segment, read
from vllm_graft.train.segment_cuda import CardSegment, opened
from vllm_graft.train.targets import Engine, first
from vllm_graft.weights.contents import Contents


@pytest.fixture
def shared():
    made = Segment(4096)
    yield made
    made.close()
    assert not (Path("/dev/shm") / made.name).exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.float8_e4m3fn])
def test_a_segment_gives_back_a_copy_of_what_was_put(shared, dtype):
    tensor = torch.arange(15).reshape(3, 5).to(dtype)
    shared.view(128, dtype, (3, 5)).copy_(tensor)
    got = read(shared.name, 128, dtype, (3, 5))
    shared.view(128, dtype, (3, 5)).zero_()
    assert torch.equal(got.float(), tensor.float())


def test_only_this_user_can_open_a_segment(shared):
    assert os.stat(f"/dev/shm/{shared.name}").st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("name", "offset", "message"),
    [
        ("../../etc/passwd", 0, "is no segment"),
        ("psm_0e7cbdfe", 0, "is no segment"),
        (None, 4064, "do not lie in"),
        (None, -64, "do not lie in"),
        (None, 3, "do not lie in"),
    ],
)
def test_nothing_else_can_be_read(shared, name, offset, message):
    with pytest.raises(ValueError, match=message):
        read(name or shared.name, offset, torch.float32, (16,))


def test_too_little_shared_memory_is_said_beforehand(monkeypatch):
    monkeypatch.setattr(segment.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    with pytest.raises(MemoryError, match="has 1 MiB free, and the push needs 2; .*--shm-size"):
        Segment(2 << 20)


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ({"process": -1, "cards": ["mine", "other"]}, CardSegment),
        ({"process": -1, "cards": ["other"]}, Segment),
        ({"process": os.getpid(), "cards": ["mine"]}, Segment),
    ],
)
def test_a_card_is_used_where_other_processes_see_it(said, kind, monkeypatch):
    monkeypatch.setattr(push, "card_of", lambda _: "mine")
    monkeypatch.setattr(
        push, "CardSegment", lambda size, device, ranks: CardSegment.__new__(CardSegment)
    )
    made = push._segment(64, torch.device("cuda", 0), {**said, "ranks": 1})
    assert type(made) is kind
    if kind is Segment:
        made.close()


def read_from_card(place, conveyed):
    with opened(place) as card:
        conveyed.put(card[64:124].view(torch.float32).cpu().tolist())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
def test_another_process_reads_from_the_card():
    processes = multiprocessing.get_context("spawn")
    made, conveyed = CardSegment(4096, torch.device("cuda", 0), 2), processes.Queue()
    for wanted in (torch.arange(15.0), torch.arange(15.0) + 1):
        made.view(64, torch.float32, (15,)).copy_(wanted)
        for place in json.loads(json.dumps(made.place())):
            reader = processes.Process(target=read_from_card, args=(place, conveyed))
            reader.start()
            assert conveyed.get(timeout=120) == wanted.tolist()
            reader.join()
    held = torch.cuda.memory_allocated()
    made.close()
    assert held - torch.cuda.memory_allocated() >= 4096


def test_a_card_that_is_not_seen_is_named():
    with pytest.raises(ValueError, match="card GPU-none is not visible here"), opened(["GPU-none"]):
        pass


def test_the_models_must_be_the_same():
    ours = {"a": (torch.float32, torch.Size([2])), "b": (torch.float32, torch.Size([2]))}
    theirs = {"a": (torch.bfloat16, torch.Size([2])), "c": (torch.float32, torch.Size([2]))}
    check_same(ours, {**ours, "a": theirs["a"]})  # the engine's dtype may differ
    with pytest.raises(WeightError, match=r"(?s)the trainer lacks: c\n.*the engine has no: b$"):
        check_same(ours, theirs)


def test_a_model_without_a_mapping_is_told_to_bring_one():
    with pytest.raises(WeightError, match="Linear has no load_weights.*pass name_mapping"):
        Contents(torch.nn.Linear(2, 3))
    assert Contents(torch.nn.Linear(2, 3, bias=False), {"w": "weight"}).described == {
        "w": (torch.float32, (3, 2))
    }


def test_ranks_under_torchrun_are_refused():
    config = SimpleNamespace(distributed_executor_backend="external_launcher", world_size=2)
    engine = SimpleNamespace(vllm_config=SimpleNamespace(parallel_config=config))
    with pytest.raises(WeightError, match="2 ranks under torchrun"):
        Engine(SimpleNamespace(llm_engine=engine))


def test_the_rank_that_refused_is_named():
    with pytest.raises(WeightError, match="rank 1: no room"):
        first([{}, {"error": "no room"}])
    with pytest.raises(vllm_graft.WeightError, match="^no room"):
        first([{"error": "no room"}])


class FakeEngine:
    """An `AsyncLLM` whose workers agree to everything, and the calls it got."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.output_processor = SimpleNamespace(request_states={"waiting": None})

    def __getattr__(self, name: str):
        async def call(*_, args=(), **__):
            self.calls.append(" ".join([name, *args[:1]]))
            return [{}]

        return call


def test_a_server_gives_a_silent_sender_up(monkeypatch):
    monkeypatch.setattr(_vllm_routes, "PATIENCE_S", 0.05)
    engine = FakeEngine()

    async def push() -> None:
        updates = _vllm_routes.Updates(SimpleNamespace(engine_client=engine))
        await updates.take("start", {"push": "a"})
        await asyncio.sleep(0.02)
        await updates.take("write", {"push": "a"})
        await asyncio.sleep(0.04)
        assert updates.refusal is None
        await asyncio.sleep(0.1)
        assert updates.refusal is not None
        assert "nothing came from its sender" in updates.refusal
        await updates.take("start", {"push": "b"})
        await updates.take("finish", {"push": "b"})
        await asyncio.sleep(0.1)
        assert updates.refusal is None

    asyncio.run(push())
    assert engine.calls == [
        "pause_generation", "collective_rpc start", "collective_rpc write",
        "collective_rpc abandon", "abort",
        "pause_generation", "collective_rpc start", "collective_rpc finish",
        "reset_prefix_cache", "resume_generation",
    ]  # fmt: skip
