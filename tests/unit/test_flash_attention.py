"""TrainableFlashAttention: a block against the same block written out in float64."""

from __future__ import annotations

import pytest
import torch

from tests.support import reference_attention, relative_error
from vllm_graft import TrainableFlashAttention, convert_freqs_cis_to_real, packed

LENGTHS = (3, 17, 40)
WIDTH, HEADS, KV_HEADS, HEAD_DIM = 96, 4, 2, 32


def complex_table(rows: int = 64, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    frequencies = 10000.0 ** -(torch.arange(0, HEAD_DIM, 2, dtype=dtype) / HEAD_DIM)
    angles = torch.outer(torch.arange(rows, dtype=dtype), frequencies)
    return torch.polar(torch.ones_like(angles), angles)


def reference(block: TrainableFlashAttention, x: torch.Tensor, window: int | None) -> torch.Tensor:
    """The block in plain torch: separate products, complex RoPE, written-out attention."""
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    if block.use_fused_qkv:
        weights = block.qkv.weight.split(
            [HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM]
        )
        out_weight = block.o_proj.weight
    else:
        weights = (block.wq.weight, block.wk.weight, block.wv.weight)
        out_weight = block.wo.weight
    q, k, v = ((x @ w.T).unflatten(-1, (-1, HEAD_DIM)) for w in weights)
    if block.q_norm is not None:
        q, k = (
            h * torch.rsqrt(h.square().mean(-1, keepdim=True) + n.eps) * n.weight
            for h, n in ((q, block.q_norm), (k, block.k_norm))
        )
    turn = complex_table()[positions][:, None]
    q, k = (
        torch.view_as_real(torch.view_as_complex(h.reshape(*h.shape[:-1], -1, 2)) * turn).flatten(2)
        for h in (q, k)
    )
    out = reference_attention(q, k, v, LENGTHS, block.core.spec.scale, window)
    return out.flatten(1) @ out_weight.T


# fp32: float32 RoPE tables (1e-7 in cos and sin at position 40) and four products deep.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("norm", "window", "scale"), [(False, None, None), (True, 6, 0.3)])
def test_forward_and_all_gradients_match_float64(dtype, tolerance, fused, norm, window, scale):
    torch.manual_seed(0)
    block = TrainableFlashAttention(
        WIDTH, HEADS, KV_HEADS, HEAD_DIM, scale=scale, use_fused_qkv=fused, use_qk_norm=norm,
        sliding_window=window,
    ).to(dtype)  # fmt: skip
    x = torch.randn(sum(LENGTHS), WIDTH).to(dtype).requires_grad_()
    borders = torch.tensor([0, *LENGTHS]).cumsum(0)
    table = complex_table().to(torch.complex64)
    out = block(x, table, cu_seqlens=borders)
    weight = torch.randn(out.shape)
    leaves = [x, *block.parameters()]
    grads = torch.autograd.grad((out.float() * weight).sum(), leaves)

    exact_block = TrainableFlashAttention(
        WIDTH, HEADS, KV_HEADS, HEAD_DIM, scale=scale, use_fused_qkv=fused, use_qk_norm=norm
    ).double()
    exact_block.load_state_dict({n: t.double() for n, t in block.state_dict().items()})
    exact_x = x.detach().double().requires_grad_()
    want = reference(exact_block, exact_x, window)
    exact_leaves = [exact_x, *exact_block.parameters()]
    want_grads = torch.autograd.grad((want * weight.double()).sum(), exact_leaves)

    assert relative_error(out, want) < tolerance
    for got, wanted in zip(grads, want_grads, strict=True):
        assert relative_error(got, wanted) < tolerance


def block_and_input(**options) -> tuple[TrainableFlashAttention, torch.Tensor]:
    torch.manual_seed(0)
    block = TrainableFlashAttention(WIDTH, HEADS, KV_HEADS, HEAD_DIM, **options)
    return block, torch.randn(2, 10, WIDTH)


def test_parameters_have_the_names_of_the_api():
    fused, _ = block_and_input(use_qk_norm=True)
    split, _ = block_and_input(use_fused_qkv=False)
    norms = {"q_norm.weight", "k_norm.weight"}
    assert set(fused.state_dict()) == {"qkv.weight", "o_proj.weight"} | norms
    assert set(split.state_dict()) == {f"{w}.weight" for w in ("wq", "wk", "wv", "wo")}


@pytest.mark.parametrize("table", ["complex", "real", "doubled"])
def test_table_layouts(table):
    block, x = block_and_input()
    turn = complex_table(dtype=torch.float32)
    real = convert_freqs_cis_to_real(turn)
    if table == "doubled":
        block.rope_interleaved = False
        doubled = torch.cat([turn.real, turn.real, turn.imag, turn.imag], -1)
        assert torch.equal(block(x, doubled), block(x, real))
    else:
        assert torch.equal(block(x, turn if table == "complex" else real), block(x, real))


def test_rows_of_a_batch_and_packed_samples_agree():
    block, x = block_and_input()
    turn = complex_table(dtype=torch.float32)
    batched = block(x, turn)
    flat = block(x.flatten(0, 1), turn, cu_seqlens=torch.tensor([0, 10, 20]))
    with packed([0, 10, 20]):
        in_context = block(x.flatten(0, 1), turn)
    assert torch.equal(batched.flatten(0, 1), flat)
    assert torch.equal(flat, in_context)


def test_rope_is_not_skipped_outside_vllm_and_explicit_positions_count():
    block, x = block_and_input()
    turn = complex_table(dtype=torch.float32)
    plain = block(x, turn)
    assert not torch.allclose(plain, block(x))
    shifted = block(x, turn, positions=torch.arange(10) + 5)
    # RoPE is relative: a common shift changes nothing but rounding.
    assert relative_error(shifted, plain) < 1e-5
    stretched = block(x, turn, positions=torch.arange(10) * 3)
    assert not torch.allclose(stretched, plain)


def test_a_prefix_slice_reaches_positions_beyond_it():
    block, x = block_and_input()
    turn = complex_table(dtype=torch.float32)
    positions = torch.arange(10) + 40
    assert torch.equal(
        block(x, turn[:10], positions=positions), block(x, turn, positions=positions)
    )


@pytest.mark.parametrize("positions", [torch.arange(10) + 60, torch.arange(10) - 1])
def test_positions_outside_the_table_raise(positions):
    block, x = block_and_input()
    with pytest.raises(IndexError, match="is outside the table of 64 rows"):
        block(x, complex_table(dtype=torch.float32), positions=positions)


def test_a_dense_mask_is_refused():
    block, x = block_and_input()
    with pytest.raises(ValueError, match="takes no dense attention_mask"):
        block(x, None, torch.ones(10, 10))


def test_a_table_of_another_width_is_refused():
    block, x = block_and_input()
    with pytest.raises(ValueError, match=r"width 24 does not fit head_dim=32"):
        block(x, torch.zeros(64, 24))


def test_dropout_and_bad_sizes():
    block, x = block_and_input(dropout=0.5)
    assert not torch.allclose(block.train()(x), block.eval()(x))
    with pytest.raises(ValueError, match="hidden_size=96 is not a multiple of num_heads=5"):
        TrainableFlashAttention(96, 5)
