"""load_external_weights: every tensor and every parameter accounted for."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vllm_graft import WeightError, load_external_weights
from vllm_graft.weights.load import Load
from vllm_graft.weights.mapping import NameMap, Place
from vllm_graft.weights.slots import tied_names


class Model(nn.Module):
    def __init__(self, layers: int = 12, tied: bool = False) -> None:
        super().__init__()
        self.emb = nn.Embedding(8, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 6, bias=False) for _ in range(layers))
        self.head = nn.Linear(4, 8, bias=False)
        if tied:
            self.head.weight = self.emb.weight


MAPPING = {
    "model.embed.weight": "emb.weight",
    "model.layers.{}.w.weight": "layers.{}.weight",
    "head.weight": "head.weight",
}


def checkpoint(layers: int = 12, **changes):
    tensors = {
        "model.embed.weight": torch.rand(8, 4),
        **{f"model.layers.{i}.w.weight": torch.rand(6, 4) for i in range(layers)},
        "head.weight": torch.rand(8, 4),
    }
    tensors |= changes
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def test_everything_lands_where_the_mapping_says():
    model, tensors = Model(), checkpoint()
    result = load_external_weights(model, tensors.items(), MAPPING)
    loaded, skipped = result
    assert (loaded, skipped) == (14, 0)
    assert torch.equal(model.layers[11].weight, tensors["model.layers.11.w.weight"])
    assert result.report.loaded["head.weight"] == "head.weight"
    assert result.report.numel == sum(t.numel() for t in tensors.values())


def test_unmapped_tensors_are_skipped_by_name_and_none_drops_on_purpose(capsys):
    model = Model(2)
    tensors = checkpoint(2) | {"extra.weight": torch.zeros(1), "rope.inv_freq": torch.zeros(1)}
    mapping = MAPPING | {"rope.inv_freq": None}
    result = load_external_weights(model, tensors.items(), mapping, verbose=True)
    assert result == (4, 1)
    assert result.report.skipped == ["extra.weight"]
    assert result.report.dropped == ["rope.inv_freq"]
    assert "skipped: extra.weight" in capsys.readouterr().out


def test_dtype_is_converted_and_the_version_counter_sees_the_write():
    model = Model(1).to(torch.bfloat16)
    before = model.emb.weight._version
    tensors = checkpoint(1)
    load_external_weights(model, tensors.items(), MAPPING)
    assert torch.equal(model.emb.weight, tensors["model.embed.weight"].bfloat16())
    assert model.emb.weight._version > before and model.emb.weight.requires_grad


def test_it_streams():
    alive, most = [], 0

    def stream():
        nonlocal most
        for name, tensor in checkpoint().items():
            copied = tensor.clone()
            alive.append(weakref.ref(copied))
            yield name, copied
            del copied
            gc.collect()
            most = max(most, sum(ref() is not None for ref in alive))

    load_external_weights(Model(), stream(), MAPPING)
    assert most <= 1


def test_tied_parameters_need_one_value_only():
    model = Model(1, tied=True)
    load_external_weights(model, checkpoint(1, **{"head.weight": None}).items(), MAPPING)
    same = torch.rand(8, 4)
    both = checkpoint(1, **{"model.embed.weight": same, "head.weight": same.clone()})
    load_external_weights(model, both.items(), MAPPING)
    with pytest.raises(WeightError, match=r"already loaded from .*\(tied\), other values"):
        load_external_weights(model, checkpoint(1).items(), MAPPING)


@pytest.mark.parametrize(
    ("tensors", "mapping", "text"),
    [
        (
            {},
            {"a": "layers.{}.wieght"},
            "placeholders against 1",
        ),
        (
            {},
            {"a.{}": "layers.{}.wieght"},
            r"'a.{}' -> 'layers.{}.wieght'.*no such parameter; nearest existing: layers",
        ),
        (
            {"head.weight": torch.rand(4, 8)},
            MAPPING,
            r"'head.weight' -> parameter 'head.weight': shape \(4, 8\) does not fit \(8, 4\) "
            r"\(transposed\?\)",
        ),
        (
            {"model.layers.7.w.weight": torch.rand(6, 4)},
            MAPPING,
            r"'model.layers.7.w.weight' maps to 'layers.7.weight', which the model does not have",
        ),
        (
            {"head.weight": torch.zeros(8, 4, dtype=torch.float8_e5m2)},
            MAPPING,
            "float8_e5m2 for a torch.float32 parameter looks quantized",
        ),
        (
            {"head.weight": torch.zeros(8, 4, dtype=torch.int32)},
            MAPPING,
            "int32 for a torch.float32 parameter looks quantized",
        ),
        (
            {"head.weight": None, "lm_head.weight": torch.rand(8, 4)},
            MAPPING,
            r"1 parameter was left.*\n  head.weight .*not mapped: nearest existing: lm_head",
        ),
    ],
)
def test_bad_input_is_refused_with_names_and_shapes(tensors, mapping, text):
    with pytest.raises(WeightError, match=text):
        load_external_weights(Model(2), checkpoint(2, **tensors).items(), mapping)


def test_a_dict_and_a_list_target_are_explained():
    with pytest.raises(TypeError, match=r"pass state_dict.items\(\)"):
        load_external_weights(Model(1), checkpoint(1), MAPPING)
    with pytest.raises(WeightError, match="expected one model name, a RowOrder, Rows or None"):
        load_external_weights(Model(1), [], {"a": ["b", "c"]})


def test_the_same_parameter_twice_is_refused():
    twice = [*checkpoint(1).items(), ("head.weight", torch.rand(8, 4))]
    with pytest.raises(WeightError, match="'head.weight'.*already loaded from 'head.weight'"):
        load_external_weights(Model(1), twice, MAPPING)


def test_a_load_in_several_calls_is_accounted_for_later():
    model = Model(1)
    load = Load(tied_names(model))
    with load.running():
        for item in list(checkpoint(1).items())[:-1]:
            load_external_weights(model, [item], MAPPING)
    assert [len(report.loaded) for report in load.reports] == [1, 1]
    assert [str(gap) for gap in load.account.missing()] == ["head.weight"]


def test_a_parameters_own_weight_loader_is_used():
    model, calls = Model(1), []
    weight = model.head.weight
    weight.weight_loader = lambda param, tensor: calls.append(tensor.shape)
    tensors = checkpoint(1, **{"head.weight": torch.rand(16, 4)})  # it shards by itself
    load_external_weights(model, tensors.items(), MAPPING)
    assert calls == [(16, 4)]


def test_dtensor_parameters_keep_their_slice():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        model, tensors = Model(1), checkpoint(1)
        sharded = distribute_tensor(torch.zeros(8, 4), mesh, [Shard(0)], src_data_rank=None)
        model.head.weight = nn.Parameter(sharded)
        load_external_weights(model, tensors.items(), MAPPING)
        local = model.head.weight.to_local()
        assert torch.equal(local, tensors["head.weight"][4:])
    finally:
        dist.destroy_process_group()


@given(
    numbers=st.lists(st.integers(0, 10**6), min_size=1, max_size=3),
    words=st.lists(st.sampled_from(["w", "layers", "a_b", "q+k", "x"]), min_size=4, max_size=4),
)
def test_placeholders_carry_any_numbers_over_in_order(numbers, words):
    def name(prefix: str, fill) -> str:
        return prefix + "".join(f".{w}.{n}" for w, n in zip(words, fill, strict=False))

    holes = ["{}"] * len(numbers)
    names = NameMap({name("in", holes): name("out", holes)})
    assert names(name("in", numbers)) == Place(name("out", numbers))
    assert names(name("in", numbers) + ".more") is None
