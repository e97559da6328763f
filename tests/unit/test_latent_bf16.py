"""Graft's latent attention kernel against attention written out."""

from __future__ import annotations

import pytest
import torch

from vllm_graft.kernels import latent_bf16

pytestmark = pytest.mark.skipif(
    not latent_bf16.available(), reason="needs AVX-512 with bf16 and a compiler"
)

LENGTHS = (1, 15, 16, 17, 300, 513, 1100)
SIZES = [(16, 512, 64), (5, 48, 16), (33, 80, 8), (7, 16, 2), (128, 512, 64)]
"""Heads, latent rank, rotated dims: one group of lanes, a part of one, several; odd numbers of
heads and of value vectors."""
SCALE = 0.07


def problem(heads, rank, rope):
    """A cache with blocks in no order, NaN where nobody may look, and a query per length."""
    torch.manual_seed(heads)
    blocks = -(-max(LENGTHS) // 16)
    table = torch.randperm(len(LENGTHS) * blocks).int().view(len(LENGTHS), blocks)
    cache = torch.randn(table.numel(), 16, rank + rope).bfloat16()
    for row, length in zip(table, LENGTHS, strict=True):
        flat = cache[row.long()].flatten(0, 1)
        flat[length:] = torch.nan
        cache[row.long()] = flat.view(blocks, 16, -1)
    q = torch.randn(len(LENGTHS), heads, rank + rope).bfloat16()
    return q, cache, table, torch.arange(len(LENGTHS)), torch.tensor(LENGTHS).int()


def written_out(q, cache, table, sequence, lengths, rank):
    rows = []
    for one, at, length in zip(q.double(), sequence, lengths, strict=True):
        keys = cache[table[at].long()].flatten(0, 1)[:length].double()
        rows.append((one @ keys.T * SCALE).softmax(-1) @ keys[:, :rank])
    return torch.stack(rows)


@pytest.mark.parametrize(("heads", "rank", "rope"), SIZES)
def test_as_written_out(heads, rank, rope):
    given = problem(heads, rank, rope)
    got = latent_bf16.attend(*given, rank, SCALE)
    want = written_out(*given, rank)
    # Half a unit of bf16's last place, and float32's rounding of sums before it.
    assert bool(((got.double() - want).abs() <= want.abs() * 2**-8 + 1e-4).all())


@pytest.mark.parametrize(("heads", "rank", "rope"), SIZES)
def test_a_query_does_not_depend_on_others(heads, rank, rope):
    q, cache, table, sequence, lengths = problem(heads, rank, rope)
    together = latent_bf16.attend(q, cache, table, sequence, lengths, rank, SCALE)
    for i in range(len(LENGTHS)):
        alone = latent_bf16.attend(
            q[i : i + 1], cache, table, sequence[i : i + 1], lengths[i : i + 1], rank, SCALE
        )
        assert torch.equal(alone[0], together[i])


def test_large_scores_do_not_overflow():
    q, cache, table, sequence, lengths = problem(16, 64, 16)
    got = latent_bf16.attend(q * 200, cache, table, sequence, lengths, 64, SCALE)
    want = written_out(q * 200, cache, table, sequence, lengths, 64)
    assert bool(got.isfinite().all())
    # One key has nearly all the weight; scores of thousands have float32's rounding.
    assert bool(((got.double() - want).abs() <= want.abs() * 2**-6 + 2e-2).all())


def test_other_pages_are_refused():
    q, cache, *rest = problem(16, 64, 16)
    with pytest.raises(RuntimeError, match="pages of 16 contiguous keys"):
        latent_bf16.attend(q, cache.view(-1, 8, 80), *rest, 64, SCALE)
    with pytest.raises(RuntimeError, match="multiple of 16"):
        latent_bf16.attend(q, cache, *rest, 60, SCALE)


@pytest.mark.parametrize("other", [torch.float32, torch.float16])
def test_other_dtypes_are_left_to_vllm(other):
    assert not latent_bf16.takes(torch.zeros(1, 16, 576, dtype=other), 512)
    assert not latent_bf16.takes(torch.zeros(1, 16, 570).bfloat16(), 506)
