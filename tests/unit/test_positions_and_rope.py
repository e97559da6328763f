"""The batch in context, and RoPE tables."""

from __future__ import annotations

import pytest
import torch

from vllm_graft import convert_freqs_cis_to_real, packed, store_positions_in_context
from vllm_graft.positions import TokenBatch, current_batch, running
from vllm_graft.rope import apply_rope, whole_table


def test_packed_restarts_positions_in_every_sample():
    with packed([0, 3, 3, 5]) as batch:
        assert current_batch() is batch
        assert batch.positions.tolist() == [0, 1, 2, 0, 1]
    assert current_batch() is None


@pytest.mark.parametrize("borders", [[1, 4], [0, 4, 2], [0], []])
def test_packed_refuses_bad_borders(borders):
    with pytest.raises(ValueError, match="rise from 0"), packed(borders):
        pass


def test_storing_positions_does_nothing_outside_vllm():
    store_positions_in_context(torch.arange(3))
    assert current_batch() is None
    with packed([0, 4]) as batch:
        store_positions_in_context(torch.arange(4) + 9)
        assert current_batch() is batch


def test_storing_positions_overrides_them_while_serving():
    with running(TokenBatch(positions=torch.arange(3), serving=True)):
        store_positions_in_context(None)
        assert current_batch().positions.tolist() == [0, 1, 2]
        store_positions_in_context(torch.tensor([[5, 6, 7]]))
        assert current_batch().positions.tolist() == [5, 6, 7]
        with pytest.raises(ValueError, match="expected 3 positions"):
            store_positions_in_context(torch.arange(4))


def test_convert_keeps_values_and_passes_real_tables_through():
    angles = torch.rand(6, 4)
    table = torch.polar(torch.ones(6, 4), angles)
    real = convert_freqs_cis_to_real(table)
    assert torch.equal(real, torch.cat([table.real, table.imag], -1))
    assert convert_freqs_cis_to_real(real) is real


def test_interleaved_and_half_split_differ_only_in_pairing():
    x = torch.randn(5, 2, 8)
    angles = torch.rand(5, 4)
    real = torch.cat([angles.cos(), angles.sin()], -1)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # adjacent pairs to halves
    half = apply_rope(x[..., order], real, torch.arange(5), interleaved=False)
    assert torch.equal(apply_rope(x, real, torch.arange(5))[..., order], half)


def test_whole_table_sees_through_prefix_slices_only():
    table = torch.randn(10, 4)
    assert whole_table(table[:3]) is table
    assert whole_table(table[2:5]).shape == (3, 4)
    assert whole_table(table[:3].clone()).shape == (3, 4)
    with torch.inference_mode():
        assert whole_table(table[:3]) is table


def test_positions_are_on_the_host_where_another_device_is_the_default():
    with torch.device("meta"), packed([0, 2, 5]) as batch:
        assert batch.positions.device.type == "cpu"
        assert batch.positions.tolist() == [0, 1, 0, 1, 2]
        assert batch.cu_seqlens.device.type == "cpu"
