"""The doctor's comparison: what agrees, what does not, and where."""

from __future__ import annotations

import copy
import json
import re
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from tests.doctored.written import Model, reference_of
from vllm_graft.doctor.anatomy import head
from vllm_graft.doctor.compare import agreement, divergences, first
from vllm_graft.doctor.gradients import gradients
from vllm_graft.doctor.page import page
from vllm_graft.doctor.report import Report
from vllm_graft.doctor.sides import Adapted, LeftOut, trace

PROMPTS = [[3, 14, 15, 92, 65, 35, 89, 79], list(range(1, 30))]


def test_equal_models_agree_everywhere():
    model = Model()
    want, got = trace(reference_of(model), PROMPTS), trace(Adapted(copy.deepcopy(model)), PROMPTS)
    assert agreement("training forward", got.logprobs, want.logprobs).healthy
    roles = [each.role for each in divergences(got, want)]
    assert roles == ["embedding", "layer 0 attention", "layer 0", "layer 1 attention", "layer 1"]
    assert first(divergences(got, want)) is None


def test_the_first_diverging_spot_has_name_and_both_values():
    model = Model()
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.layers[1].self_attn.o_proj.weight.mul_(2)
    found = first(divergences(trace(Adapted(broken), PROMPTS), trace(reference_of(model), PROMPTS)))
    assert (found.role, found.name) == ("layer 1 attention", "layers.1.self_attn")
    assert found.value == pytest.approx(2 * found.expected, rel=1e-4)


def test_gradients_of_equal_models_agree_and_a_detached_layer_shows():
    model = Model()
    port = copy.deepcopy(model)
    found = gradients(Adapted(port), reference_of(model), PROMPTS)
    assert len(found) == 1 + 2 * 9 and all(each.healthy for each in found)
    assert all(parameter.grad is None for parameter in port.parameters())
    port.layers[1].mlp.down_proj.register_forward_hook(lambda _, __, output: output.detach())
    wrong = [e for e in gradients(Adapted(port), reference_of(model), PROMPTS) if not e.healthy]
    assert "layers.1.mlp.down_proj.weight" in [each.name for each in wrong]


def test_the_page_shows_each_spot_and_loads_nothing():
    model = Model()
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.layers[1].self_attn.o_proj.weight.mul_(2)
    got, want = trace(Adapted(broken), PROMPTS), trace(reference_of(model), PROMPTS)
    paths = (agreement("training <forward>", got.logprobs, want.logprobs),)
    report = Report(paths, tuple(divergences(got, want)), (), (), "original", 1.0)
    text = page(report, "a & b")
    svg = ElementTree.fromstring(re.search(r"<svg.*</svg>", text)[0])
    bars = [bar for bar in svg.iter() if bar.tag.endswith("rect")]
    assert [bar.get("fill") == "#b00020" for bar in bars] == [False, False, False, True, True]
    assert "a &amp; b" in text and "training &lt;forward&gt;" in text
    assert "layers.1.self_attn" in text
    assert not re.search(r"(src|href)=|@import|url\(", text)


def log_probs_only():
    """What the doctor reports with a reference that has no layers and no gradients."""
    paths = (agreement("prefill", torch.zeros(2, 8), torch.zeros(2, 8)),)
    names = ("chunked prefill", "layers", "gradients", "diagnosis")
    left_out = tuple(LeftOut(name, "log-probs <only>") for name in names)
    return Report(paths, (), (), (), "vllm", 1.0, left_out)


def test_the_page_says_what_was_left_out_and_shows_nothing_in_its_place():
    text = page(log_probs_only(), "port")
    for name in ("chunked prefill", "layers", "gradients", "diagnosis"):
        assert f"<li>{name}: log-probs &lt;only&gt;</li>" in text
    assert "<svg" not in text and "No module is further" not in text
    assert "0 weights" not in text


def test_table_and_json_say_what_was_left_out(tmp_path, capsys, monkeypatch):
    from vllm_graft.cli import doctor as command

    for name in ("register_target", "import_factory", "settle_environment"):
        monkeypatch.setattr(command, name, lambda *_, **__: "Port")
    monkeypatch.setattr(command, "_run", lambda *_, **__: log_probs_only())
    assert command.doctor("checkpoint", reference="vllm", json_file=tmp_path / "r.json") == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "r.json").read_text())["left_out"]
    for name in ("chunked prefill", "layers", "gradients", "diagnosis"):
        assert f"Left out: {name}: log-probs <only>" in shown
        assert {"what": name, "why": "log-probs <only>"} in found


def test_a_layers_weight_in_the_shape_of_the_vocabulary_is_not_the_head():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear_fc1 = nn.Linear(8, 32)

    model = nn.Module()
    model.wte = nn.Embedding(32, 8)
    model.layers = nn.ModuleList([Block()])
    assert head(model) is None
    model.output = nn.Linear(8, 32)
    assert head(model) == ("output", model.output)
