"""Packed heads of latent attention have the bits of the weight's own products."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vllm_graft.attention.latent import PlainHeads
from vllm_graft.attention.mla import MLAConfig, TrainableMLA
from vllm_graft.kernels import packed_bf16
from vllm_graft.products import restore_weights
from vllm_graft.serve.heads import packed_heads

N, C, V, R = 4, 128, 96, 512

pytestmark = pytest.mark.skipif(
    not packed_bf16.available(), reason="needs AVX-512 with bf16 and no AMX"
)


@pytest.fixture
def wkv_b():
    torch.manual_seed(0)
    return nn.Linear(R, N * (C + V), bias=False, dtype=torch.bfloat16)


def check(packed, wkv_b, rows):
    plain = PlainHeads(wkv_b.weight.detach(), N, C)
    q, latent = (torch.randn(rows, N, width).bfloat16() for width in (C, R))
    assert torch.equal(packed.absorb(q), plain.absorb(q))
    assert torch.equal(packed.expand(latent), plain.expand(latent))


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, 7, 12, 13, 130])
def test_same_bits_for_any_number_of_rows(wkv_b, rows):
    packed = packed_heads(wkv_b, N, C)
    packed.pack()
    check(packed, wkv_b, rows)


@torch.no_grad()
def test_a_changed_weight_is_packed_anew(wkv_b):
    packed = packed_heads(wkv_b, N, C)
    packed.pack()
    wkv_b.weight.mul_(-2)
    packed.refresh()
    check(packed, wkv_b, 3)
    wkv_b.load_state_dict({"weight": wkv_b.weight + 1}, assign=True)
    packed.refresh()
    check(packed, wkv_b, 3)


def test_an_unchanged_weight_is_not(wkv_b):
    packed = packed_heads(wkv_b, N, C)
    packed.pack()
    before = packed._copy
    packed.refresh()
    assert packed._copy is before


@torch.no_grad()
def test_a_released_weight_comes_back_as_it_was(wkv_b):
    packed = packed_heads(wkv_b, N, C)
    before = wkv_b.weight.clone()
    packed.pack()
    packed.release()
    assert wkv_b.weight.isnan().all()
    assert wkv_b.weight.untyped_storage().nbytes() < 100
    q = torch.randn(3, N, C).bfloat16()
    assert torch.equal(packed.absorb(q), PlainHeads(before, N, C).absorb(q))
    restore_weights(wkv_b)
    assert torch.equal(wkv_b.weight, before)


def test_a_training_forward_reads_no_released_weight():
    torch.manual_seed(0)
    config = MLAConfig(
        64, N, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16
    )
    block = TrainableMLA(config).bfloat16()
    x, table = torch.randn(5, 64).bfloat16(), torch.zeros(64, 4, dtype=torch.complex64)
    want = block(x, table)
    packed = packed_heads(block.wkv_b, N, 16)
    packed.pack()
    packed.release()
    assert torch.equal(block(x, table), want)


def test_after_unpack_the_weight_serves(wkv_b):
    packed = packed_heads(wkv_b, N, C)
    packed.pack()
    assert packed.serves
    packed.unpack()
    assert not packed.serves


@pytest.mark.parametrize("odd", ["float32", "a view"])
def test_what_is_no_bf16_parameter_is_left_alone(wkv_b, odd):
    if odd == "float32":
        wkv_b.float()
    else:
        weight = wkv_b.weight.detach()
        del wkv_b.weight
        wkv_b.weight = weight
    assert packed_heads(wkv_b, N, C) is None
