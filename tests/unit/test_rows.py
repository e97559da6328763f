"""`Rows`: one fused parameter from several checkpoint tensors, and back, exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from vllm_graft import Rows, WeightError, export_weights, load_external_weights

MAPPING = {
    "layers.{}.q": Rows("layers.{}.qkv", [0, 1, 4, 5]),
    "layers.{}.k": Rows("layers.{}.qkv", torch.tensor([2, 6])),
    "layers.{}.v": Rows("layers.{}.qkv", (3, 7)),
}


class Model(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Module() for _ in range(layers))
        for layer in self.layers:
            layer.qkv = nn.Parameter(torch.zeros(8, 3))


def checkpoint(**changes):
    sizes = {"q": 4, "k": 2, "v": 2}
    tensors = {f"layers.{i}.{n}": torch.rand(s, 3) for i in range(2) for n, s in sizes.items()}
    return {k: v for k, v in (tensors | changes).items() if v is not None}


def load(tensors, mapping=MAPPING, model=None):
    model = model or Model()
    return model, load_external_weights(model, tensors.items(), mapping).report


def test_each_tensor_lands_in_its_rows_and_comes_back():
    tensors = checkpoint()
    model, report = load(dict(reversed(tensors.items())))
    q, k, v = (tensors[f"layers.1.{n}"] for n in "qkv")
    assert torch.equal(model.layers[1].qkv, torch.cat([q[:2], k[:1], v[:1], q[2:], k[1:], v[1:]]))
    assert report.loaded["layers.1.k"] == "layers.1.qkv[2 rows from 2]"
    assert report.missing == [] and report.numel == 2 * 8 * 3
    exported = dict(export_weights(model, MAPPING))
    assert list(exported) == list(tensors)
    assert all(torch.equal(exported[name], tensors[name]) for name in tensors)


@given(st.data())
def test_any_partition_round_trips(data):
    order = data.draw(st.permutations(range(12)))
    cuts = sorted(data.draw(st.sets(st.integers(1, 11), max_size=4)))
    parts = [order[a:b] for a, b in zip([0, *cuts], [*cuts, 12], strict=True)]
    mapping = {f"part{i}": Rows("weight", rows) for i, rows in enumerate(parts)}
    tensors = {f"part{i}": torch.rand(len(rows), 2) for i, rows in enumerate(parts)}
    model, _ = load(tensors, mapping, nn.Linear(2, 12, bias=False))
    exported = dict(export_weights(model, mapping))
    assert all(torch.equal(exported[name], tensors[name]) for name in tensors)


def test_an_absent_tensor_is_named_with_its_rows():
    with pytest.raises(
        WeightError,
        match=r"1 parameter was left.*\n  layers.0.qkv\[2 rows from 2\] \(expected from "
        r"'layers.0.k'; 6 of 8 rows came",
    ):
        load(checkpoint(**{"layers.0.k": None}))
    without_q = {name: t for name, t in checkpoint().items() if not name.startswith("layers.0")}
    with pytest.raises(WeightError, match=r"\n  layers.0.qkv \(expected from 'layers.0.q'"):
        load(without_q)


def test_rows_that_no_entry_names_are_missing():
    mapping = {name: rows for name, rows in MAPPING.items() if not name.endswith("k")}
    tensors = {name: t for name, t in checkpoint().items() if not name.endswith("k")}
    with pytest.raises(WeightError, match=r"4 parameters were left.*\n  layers.0.qkv\[2\] \("):
        load(tensors, mapping)


@pytest.mark.parametrize(
    ("change", "extra", "text"),
    [
        ({"layers.0.k": torch.rand(3, 3)}, {}, r"\(3, 3\) does not fit \(2, 3\), 2 rows of \(8"),
        ({"other": torch.rand(2, 3)}, {"other": Rows("layers.0.qkv", [7, 8])}, "means at least 9"),
        ({"other": torch.rand(2, 3)}, {"other": Rows("layers.0.qkv", [1, 2])}, "already loaded"),
        ({"other": torch.rand(8, 3)}, {"other": "layers.0.qkv"}, "already loaded from"),
    ],
)
def test_what_does_not_fit_is_refused(change, extra, text):
    with pytest.raises(WeightError, match=text):
        load(checkpoint(**change), MAPPING | extra)


@pytest.mark.parametrize("rows", [[], [0, 0], [-1, 0]])
def test_rows_must_differ(rows):
    with pytest.raises(WeightError, match="expected different rows from 0 on"):
        Rows("w", rows)


def test_rows_of_a_stack_row_are_refused():
    with pytest.raises(WeightError, match="name the parameter without it"):
        load({}, {"a.{}": Rows("layers.0.qkv[{}]", [0])})


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ({"more": Rows("layers.0.qkv", [0, 1])}, "fills it from .* cannot be reversed"),
        ({"layers.{}.v": None}, r"qkv\[3\]'.*no entry of name_mapping names it, and 2 of 8"),
    ],
)
def test_mappings_that_cannot_be_reversed_are_refused(extra, text):
    with pytest.raises(WeightError, match=text):
        export_weights(Model(), MAPPING | extra)


@pytest.fixture
def mesh():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    yield init_device_mesh("cpu", (2,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dim", [0, 1])
def test_a_sharded_parameter_keeps_its_slice(mesh, dim):
    model, tensors = Model(1), checkpoint()
    model.layers[0].qkv = nn.Parameter(
        distribute_tensor(torch.zeros(8, 4), mesh, [Shard(dim)], src_data_rank=None)
    )
    tensors = {f"layers.0.{n}": torch.rand(s, 4) for n, s in {"q": 4, "k": 2, "v": 2}.items()}
    load(tensors, model=model)
    whole, _ = load({k: v[:, :3] for k, v in tensors.items()}, model=Model(1))
    local = model.layers[0].qkv.to_local()
    if dim == 0:
        assert torch.equal(local[:, :3], whole.layers[0].qkv[4:])
    else:
        assert torch.equal(local[:, :1], whole.layers[0].qkv[:, 2:])
