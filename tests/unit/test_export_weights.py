"""export_weights: what it yields loads back bit for bit, or the mapping is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from vllm_graft import (
    RowOrder,
    WeightError,
    export_weights,
    interleave_rope_rows,
    load_external_weights,
)

E, F, D = 5, 3, 4


class Layer(nn.Module):
    def __init__(self, experts: int = E) -> None:
        super().__init__()
        self.w1_EFD = nn.Parameter(torch.rand(experts, F, D))
        self.wq = nn.Linear(D, 2 * (2 + 4), bias=False)
        self.register_buffer("expert_bias_E", torch.rand(experts))
        self.register_buffer("table", torch.rand(7), persistent=False)


class Model(nn.Module):
    def __init__(self, layers: int = 2, *, tied: bool = False) -> None:
        super().__init__()
        self.emb = nn.Embedding(8, D)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.head = nn.Linear(D, 8, bias=False)
        if tied:
            self.head.weight = self.emb.weight


MAPPING = {
    "model.layers.61.*": None,
    "embed.weight": "emb.weight",
    "model.layers.{}.experts.{}.gate.weight": "layers.{}.w1_EFD[{}]",
    "model.layers.{}.q.weight": RowOrder("layers.{}.wq.weight", interleave_rope_rows(2, 2, 4)),
    "model.layers.{}.bias": "layers.{}.expert_bias_E",
    "lm_head.weight": "head.weight",
    "inv_freq": None,
}


def test_a_round_trip_through_a_file_is_exact(tmp_path):
    model, again = Model(), Model()
    exported = dict(export_weights(model, MAPPING))
    assert len(exported) == 2 + 2 * (E + 2)
    assert torch.equal(exported["model.layers.1.experts.3.gate.weight"], model.layers[1].w1_EFD[3])
    save_file(exported, tmp_path / "model.safetensors")
    result = load_external_weights(
        again, load_file(tmp_path / "model.safetensors").items(), MAPPING
    )
    assert result == (len(exported), 0) and not result.report.dropped
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


@given(
    rows=st.permutations(range(6)),
    experts=st.integers(1, 12),
    layers=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_load_then_export_gives_the_checkpoint_back(rows, experts, layers, dtype):
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Module() for _ in range(layers))
            for layer in self.layers:
                layer.w = nn.Parameter(torch.zeros(experts, 6, 2, dtype=dtype))

    checkpoint = {
        f"l.{i}.e.{j}.w": torch.rand(6, 2).to(dtype) for i in range(layers) for j in range(experts)
    }
    mapping = {"l.{}.e.{}.w": RowOrder("layers.{}.w[{}]", rows)}
    model = Stack()
    load_external_weights(model, checkpoint.items(), mapping)
    first = checkpoint["l.0.e.0.w"]
    assert torch.equal(model.layers[0].w[0], first[list(rows)])
    exported = dict(export_weights(model, mapping))
    assert exported.keys() == checkpoint.keys()
    assert all(torch.equal(exported[name], checkpoint[name]) for name in checkpoint)


def test_a_tied_parameter_comes_once_under_the_first_name_of_the_mapping():
    model = Model(tied=True)
    assert "lm_head.weight" not in dict(export_weights(model, MAPPING))
    turned = {"lm_head.weight": "head.weight"} | MAPPING
    names = dict(export_weights(model, turned))
    assert "lm_head.weight" in names and "embed.weight" not in names


def test_it_streams_views_and_looks_before_the_first_tensor():
    model = Model()
    stream = export_weights(model, MAPPING)
    name, tensor = next(iter(stream))
    assert name == "embed.weight" and tensor.data_ptr() == model.emb.weight.data_ptr()
    assert not tensor.requires_grad


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"lm_head.copy": "head.weight"},
            "'head.weight'.*'lm_head.weight' and 'lm_head.copy'.*cannot be reversed",
        ),
        (
            {"model.layers.{}.experts": "layers.{}.w1_EFD"},
            r"'layers.0.w1_EFD'.*experts.{}.gate.weight' and 'model.layers.{}.experts'",
        ),
        ({"lm_head.weight": None}, "parameter 'head.weight': no entry of name_mapping"),
        (
            {"model.layers.{}.experts.{}.gate.weight": None, "first.{}": "layers.{}.w1_EFD[0]"},
            r"'layers.0.w1_EFD\[1\]': no entry .*4 of 5 rows",
        ),
        (
            {"model.layers.1.q.weight": None},
            "'layers.1.wq.weight' would be exported as 'model.layers.1.q.weight', .* not at all",
        ),
        ({"a": "heed.weight"}, "no such parameter"),
    ],
)
def test_a_mapping_that_cannot_be_reversed_is_refused(change, text):
    with pytest.raises(WeightError, match=text):
        export_weights(Model(), MAPPING | change)


def test_interleaving_turns_halves_into_pairs():
    assert interleave_rope_rows(1, 2, 6) == (0, 1, 2, 5, 3, 6, 4, 7)
    assert interleave_rope_rows(2, 0, 4) == (0, 2, 1, 3, 4, 6, 5, 7)
    with pytest.raises(ValueError, match="rope_dim=5 is odd"):
        interleave_rope_rows(1, 0, 5)


def test_interleaved_rows_give_the_same_scores():
    """Half-split RoPE on checkpoint rows and pairwise RoPE on model rows agree (float64)."""
    heads, nope, rope, length = 3, 4, 8, 6
    x = torch.rand(length, 16, dtype=torch.float64)
    weights = [torch.rand(heads * (nope + rope), 16, dtype=torch.float64) for _ in range(2)]
    angles = torch.outer(torch.arange(length), 0.3 ** torch.arange(rope // 2)).double()
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]

    def scores(rows, pair):
        q, k = ((x @ w[rows].T).view(length, heads, nope + rope) for w in weights)
        q, k = (torch.cat([t[..., :nope], pair(t[..., nope:])], -1) for t in (q, k))
        return torch.einsum("inh,jnh->nij", q, k)

    def halves(t):
        turned = torch.complex(*t.chunk(2, -1)) * turns
        return torch.cat([turned.real, turned.imag], -1)

    def pairs(t):
        turned = torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous()) * turns
        return torch.view_as_real(turned).flatten(-2)

    order = list(interleave_rope_rows(heads, nope, rope))
    # Sums of 12 products in another order.
    torch.testing.assert_close(
        scores(slice(None), halves), scores(order, pairs), rtol=1e-12, atol=0
    )


def test_dtensors_are_gathered_and_a_row_is_cut_from_each_shard():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        rows = {f"e.{i}": torch.rand(F, D) for i in range(4)}
        stack = torch.stack(list(rows.values()))
        for placement, want in (
            (Shard(0), stack[2:]),
            (Shard(2), stack[..., 2:]),
            (Replicate(), stack),
        ):
            model = nn.Module()
            empty = distribute_tensor(torch.zeros(4, F, D), mesh, [placement], src_data_rank=None)
            model.w = nn.Parameter(empty)
            load_external_weights(model, rows.items(), {"e.{}": "w[{}]"})
            assert torch.equal(model.w.to_local(), want)
        # Only a replicated tensor can be gathered in a process group that sends nothing.
        exported = dict(export_weights(model, {"e.{}": "w[{}]"}))
        assert all(torch.equal(exported[name], rows[name]) for name in rows)
    finally:
        dist.destroy_process_group()
