"""`vllm-graft map`, and an engine that loads by its plan, as the documentation shows."""

from __future__ import annotations

import json

import pytest

import vllm_graft
from examples.custom_models.qwen3_torchtitan import build_qwen3_torchtitan
from tests.docs.markdown import ROOT, blocks
from tests.support import engine, generate, prompts, qwen3_checkpoint
from vllm_graft.cli.main import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A checkpoint, and the documentation's factory beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    qwen3_checkpoint(tmp_path / "checkpoint")
    for block in blocks(ROOT / "docs/mapping.md"):
        if block.title is not None:
            (tmp_path / block.title).write_text(block.code)
    return tmp_path


def run(*arguments):
    with pytest.raises(SystemExit) as done:
        main(["map", "checkpoint", "--factory", "mapped.py:build", *arguments])
    return done.value.code


@pytest.mark.engine
def test_an_engine_loads_by_the_plan(folder, capfd):
    assert run("--out", "plan.json") == 0
    assert "layers.{}.attention_norm.weight" in capfd.readouterr().out
    vllm_graft.register("Mapped", f"{folder}/mapped.py:build")
    found = []
    vllm_graft.register("ByHand", build_qwen3_torchtitan)
    for arch in ("Mapped", "ByHand"):
        with engine(folder / "checkpoint", arch) as llm:
            found.append([c.token_ids for c in generate(llm, prompts([5, 17]), max_tokens=16)])
    assert found[0] == found[1]


def test_the_plan_as_json(folder, capfd):
    assert run("--json") == 0
    plan = json.loads(capfd.readouterr().out)
    assert {line["from"]: line["to"] for line in plan["lines"]}["lm_head.weight"] == (
        "model.lm_head.weight"
    )


def test_what_stays_open_is_one_message(folder, capfd):
    text = (folder / "mapped.py").read_text()
    extra = "    import torch\n    model.extra = torch.nn.Linear(3, 3)\n    return model.to("
    (folder / "mapped.py").write_text(text.replace("    return model.to(", extra))
    assert run() == 1
    assert "parameter 'extra.weight' [3, 3]" in capfd.readouterr().err
