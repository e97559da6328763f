"""Shares of whole parameters: what loading cuts out, and heads divided among ranks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.load_shards import Taken
from vllm_graft import (
    CoreAttention,
    MLAConfig,
    RowOrder,
    Rows,
    TrainableMLA,
    WeightError,
    load_external_weights,
)
from vllm_graft.attention.shard import shard_attention
from vllm_graft.weights import shards
from vllm_graft.weights.fp8 import dequantize
from vllm_graft.weights.shards import Shard, mark_shard, whole_shape


@pytest.fixture
def two_ranks(monkeypatch):
    monkeypatch.setattr(shards.dist, "get_world_size", lambda group: 2)


def part(whole: torch.Tensor, dim: int, rank: int) -> nn.Module:
    """A module whose `w` is one of two shares of a tensor like `whole`."""
    module = nn.Module()
    shape = list(whole.shape)
    shape[dim] //= 2
    module.w = nn.Parameter(torch.full(shape, float("nan")))
    mark_shard(module.w, Shard(dim, rank, None))
    return module


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_each_rank_keeps_its_share(two_ranks, dim, rank):
    whole = torch.arange(48.0).view(4, 6, 2)
    module = part(whole, dim, rank)
    assert whole_shape(module.w) == whole.shape
    load_external_weights(module, [("hf", whole)], {"hf": "w"})
    assert torch.equal(module.w, whole.chunk(2, dim)[rank])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_rows_of_a_stack_go_to_the_rank_that_has_them(two_ranks, dim, rank):
    whole = torch.arange(48.0).view(4, 6, 2)
    module = part(whole, dim, rank)
    experts = [(f"experts.{i}", whole[i]) for i in range(4)]
    load_external_weights(module, experts, {"experts.{}": "w[{}]"})
    assert torch.equal(module.w, whole.chunk(2, dim)[rank])


def test_a_missing_row_and_a_wrong_shape_are_named_by_the_whole(two_ranks):
    whole = torch.zeros(4, 6, 2)
    with pytest.raises(WeightError, match=r"w\[3\].*3 of 4 rows came"):
        experts = [(f"experts.{i}", whole[i]) for i in range(3)]
        load_external_weights(part(whole, 0, 0), experts, {"experts.{}": "w[{}]"})
    with pytest.raises(WeightError, match=r"shape \(2, 6, 2\) does not fit \(4, 6, 2\)"):
        load_external_weights(part(whole, 0, 0), [("hf", whole[:2])], {"hf": "w"})


def model() -> nn.Module:
    mla = MLAConfig(
        hidden_size=8, num_heads=4, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=2,
        v_head_dim=4,
    )  # fmt: skip
    return nn.ModuleDict({"core": CoreAttention(8, 4, 16), "mla": TrainableMLA(mla)})


def test_each_rank_has_its_share_of_the_heads_once():
    made = model()
    for _ in range(2):
        shard_attention(made, 2)
        assert (made["core"].num_heads, made["core"].num_kv_heads) == (4, 2)
        assert made["mla"].config.num_heads == 2


@pytest.mark.parametrize("size", [3, 8])
def test_heads_that_cannot_be_divided_are_refused_and_nothing_changed(size):
    made = model()
    with pytest.raises(ValueError, match=f"cannot be divided among tensor_parallel_size={size}"):
        shard_attention(made, size)
    assert (made["core"].num_heads, made["mla"].config.num_heads) == (8, 4)


def test_whole_heads_under_tensor_parallelism_name_the_right_order():
    core = CoreAttention(4, 2, 16)
    core.shard(2)
    with pytest.raises(ValueError, match="each rank has 1/2 of the heads.*create -> replace -> TP"):
        core(torch.zeros(3, 4, 16), torch.zeros(3, 2, 16), torch.zeros(3, 2, 16))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("dim", [0, 1])
def test_shares_of_fp8_blocks_are_those_of_the_whole(two_ranks, dim, rank):
    # Shares end inside a block: 150 rows, 143 columns.
    weight, scale = torch.randn(300, 286).to(torch.float8_e4m3fn), torch.rand(3, 3)
    module = part(torch.empty(300, 286), dim, rank)
    load_external_weights(module, [("hf", weight), ("hf_scale_inv", scale)], {"hf": "w"})
    assert torch.equal(module.w, dequantize(weight, scale, torch.float32).chunk(2, dim)[rank])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("fp8", [False, True])
def test_shares_of_reordered_rows_are_those_of_the_whole(two_ranks, fp8, dim, rank):
    order = torch.randperm(300)
    pair = [("hf", torch.randn(300, 286))]
    whole = pair[0][1]
    if fp8:
        weight, scale = whole.to(torch.float8_e4m3fn), torch.rand(3, 3)
        pair = [("hf", weight), ("hf_scale_inv", scale)]
        whole = dequantize(weight, scale, torch.float32)
    module = part(whole, dim, rank)
    load_external_weights(module, pair, {"hf": RowOrder("w", order)})
    assert torch.equal(module.w, whole[order].chunk(2, dim)[rank])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(
    "kind", ["whole", "converted", "reordered", "fp8", "stack", "fp8 stack", "fused"]
)
def test_only_the_share_is_read(two_ranks, kind, dim, rank):
    whole = torch.rand(256, 256, 2)
    tensors, mapping = {"hf": whole}, {"hf": "w"}
    if kind == "converted":
        tensors = {"hf": whole.double()}
    elif kind == "reordered":
        mapping = {"hf": RowOrder("w", torch.randperm(256))}
    elif kind == "fp8":
        whole = whole[..., 0]
        tensors = {"hf": whole.to(torch.float8_e4m3fn), "hf_scale_inv": torch.rand(2, 2)}
    elif kind == "fused":
        tensors = {"a": whole[::2].contiguous(), "b": whole[1::2].contiguous()}
        mapping = {"a": Rows("w", range(0, 256, 2)), "b": Rows("w", range(1, 256, 2))}
    elif "stack" in kind:
        tensors, mapping = {f"e.{i}": row.clone() for i, row in enumerate(whole)}, {"e.{}": "w[{}]"}
    if kind == "fp8 stack":
        scales = {f"{name}_scale_inv": torch.rand(2, 1) for name in tensors}
        tensors = {name: t.to(torch.float8_e4m3fn) for name, t in tensors.items()} | scales
    module = part(whole, dim, rank)
    with Taken() as taken:
        pairs = ((n, t if n.endswith("inv") else taken.watch(t)) for n, t in tensors.items())
        load_external_weights(module, pairs, mapping)
    size = sum(t.nbytes for n, t in tensors.items() if not n.endswith("inv"))
    assert taken.bytes == size // 2


def test_a_tied_tensor_is_compared_share_by_share(two_ranks, monkeypatch):
    monkeypatch.setattr(shards.dist, "all_reduce", lambda flag, op, group: None)
    whole = torch.rand(4, 6)
    module = nn.ModuleDict({"a": part(whole, 0, 1), "b": nn.Module()})
    module["b"].w = module["a"].w
    names = {"a": "a.w", "b": "b.w"}
    with Taken() as taken:
        load_external_weights(module, [("a", whole), ("b", taken.watch(whole.clone()))], names)
    assert taken.bytes == whole.nbytes // 2
    with pytest.raises(WeightError, match="already loaded from 'a'.*other values"):
        load_external_weights(module, [("a", whole), ("b", whole + 1)], names)
