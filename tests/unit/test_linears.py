"""Which linear layers become vLLM's, and what is refused by name. No engine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from vllm_graft.attention.mla import MLAConfig, TrainableMLA
from vllm_graft.serve import _vllm_linear
from vllm_graft.serve.linears import all_running, convert_linears, layer_finder
from vllm_graft.train.options import engine_options
from vllm_graft.weights.rows import Rows


class Marked(nn.Linear):
    """Stands for vLLM's layer, which needs an engine's configuration."""


@pytest.fixture(autouse=True)
def no_vllm(monkeypatch):
    def linear_like(old, name, vllm_config):
        new = Marked(old.in_features, old.out_features, bias=old.bias is not None)
        new.prefix = name
        return new

    monkeypatch.setattr(_vllm_linear, "linear_like", linear_like)
    monkeypatch.setattr(_vllm_linear, "is_linear", lambda module: isinstance(module, Marked))


def config(tp: int = 1, pp: int = 1, lora: object = True):
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=SimpleNamespace()),
        quant_config=None,
        lora_config=lora,
        parallel_config=SimpleNamespace(tensor_parallel_size=tp, pipeline_parallel_size=pp),
    )


class OwnForward(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def block() -> nn.Module:
    return nn.ModuleDict(
        {
            "wq": nn.Linear(8, 8),
            "own": OwnForward(8, 8),
            "mla": TrainableMLA(MLAConfig(hidden_size=8, num_heads=1)),
        }
    )


def model() -> nn.Module:
    whole = nn.Module()
    whole.embed, whole.head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
    whole.layers = nn.ModuleList([block(), block()])
    whole.layers[1].tied = nn.Linear(8, 16, bias=False)
    whole.layers[1].tied.weight = whole.head.weight
    return whole


def test_layers_in_numbered_blocks_are_converted_and_names_stay():
    whole = model()
    names = list(dict(whole.named_parameters()))
    convert_linears("A", whole, config())
    found = {name for name, module in whole.named_modules() if isinstance(module, Marked)}
    inside = {"wq", "mla.wq", "mla.wkv_a", "mla.wo"}
    assert found == {f"layers.{i}.{name}" for i in (0, 1) for name in inside}
    assert whole.layers[0].wq.prefix == "model.layers.0.wq"
    assert sorted(dict(whole.named_parameters())) == sorted(names)


def test_nothing_is_converted_where_nothing_asks():
    whole = model()
    convert_linears("A", whole, config(lora=None))
    assert not any(isinstance(module, Marked) for module in whole.modules())


@pytest.mark.parametrize("size", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_several_ranks_are_refused_by_name(size):
    several = config(tp=2) if size.startswith("tensor") else config(pp=2)
    with pytest.raises(ValueError, match=f"A: LoRA with {size}=2: .* use {size}=1"):
        convert_linears("A", model(), several)


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(ValueError, match="A: LoRA needs nn.Linear layers inside numbered"):
        convert_linears("A", nn.Sequential(OwnForward(8, 8)), config())


def test_a_layer_whose_weight_is_read_instead_is_refused():
    called, read = nn.Linear(8, 8), nn.Linear(8, 8)
    with (
        pytest.raises(ValueError, match="A: .* their weight was read instead: layers.1.wq"),
        all_running("A", {"layers.0.wq": called, "layers.1.wq": read}),
    ):
        called(read.weight)


def test_joined_rows_and_unknown_names_are_refused_for_adapters():
    whole = nn.Module()
    whole.model = nn.Module()
    whole.model.inner = nn.ModuleDict({"layers": nn.ModuleList([block()])})
    convert_linears("A", whole.model, config())
    mapping = {
        "m.{}.q.weight": "layers.{}.wq.weight",
        "m.{}.k.weight": Rows("layers.{}.mla.wo.weight", range(4)),
    }
    find = layer_finder("A", whole, [(whole.model.inner, mapping)])
    assert find("m.0.q") == find("inner.layers.0.wq") == find("layers.0.wq")
    assert find("m.0.q") == "model.inner.layers.0.wq"
    with pytest.raises(ValueError, match=r"A: LoRA for 'm.0.k': .* rows joined or reordered"):
        find("m.0.k")
    with pytest.raises(ValueError, match=r"A: LoRA for 'm.0.x': no layer .* inner.layers.0"):
        find("m.0.x")


@pytest.mark.parametrize("option", [{"quantization": "fp8"}, {"enable_lora": True}])
def test_a_trainable_engine_refuses_both(option):
    with pytest.raises(ValueError, match=f"TrainableLLM with {next(iter(option))}="):
        engine_options(None, "Any", True, option)
