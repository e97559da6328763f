"""TrainableMLA against the same block written out in float64, and the cache spec."""

from __future__ import annotations

import pytest
import torch

from tests.support import reference_attention, relative_error
from tests.unit.test_flash_attention import LENGTHS
from vllm_graft import MLAConfig, TrainableMLA, create_mla_kv_cache_spec


def config(q_lora_rank: int) -> MLAConfig:
    return MLAConfig(
        hidden_size=64, num_heads=4, q_lora_rank=q_lora_rank, kv_lora_rank=32,
        qk_nope_head_dim=24, qk_rope_head_dim=16, v_head_dim=20, scale=0.2,
    )  # fmt: skip


def table() -> torch.Tensor:
    angles = torch.outer(torch.arange(64.0), 1000.0 ** -(torch.arange(0, 16, 2) / 16))
    return torch.polar(torch.ones_like(angles), angles)


def reference(mla: TrainableMLA, x: torch.Tensor) -> torch.Tensor:
    c = mla.config
    turn = table().to(torch.complex128)[torch.cat([torch.arange(n) for n in LENGTHS])][:, None]

    def norm(h, n):
        return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + n.eps) * n.weight

    def rotate(h):
        pairs = torch.view_as_complex(h.reshape(*h.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turn).flatten(-2)

    if c.q_lora_rank:
        q = norm(x @ mla.wq_a.weight.T, mla.q_norm) @ mla.wq_b.weight.T
    else:
        q = x @ mla.wq.weight.T
    q = q.unflatten(-1, (c.num_heads, -1))
    latent, k_pe = (x @ mla.wkv_a.weight.T).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
    kv = (norm(latent, mla.kv_norm) @ mla.wkv_b.weight.T).unflatten(-1, (c.num_heads, -1))
    k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], -1)
    q = torch.cat([q[..., : c.qk_nope_head_dim], rotate(q[..., c.qk_nope_head_dim :])], -1)
    k_pe = rotate(k_pe[:, None]).expand(-1, c.num_heads, -1)
    out = reference_attention(q, torch.cat([k_nope, k_pe], -1), v, LENGTHS, c.scale)
    return out.flatten(1) @ mla.wo.weight.T


@pytest.mark.parametrize("q_lora_rank", [0, 24])
def test_forward_and_all_gradients_match_float64(q_lora_rank):
    torch.manual_seed(0)
    mla = TrainableMLA(config(q_lora_rank))
    x = torch.randn(sum(LENGTHS), 64, requires_grad=True)
    out = mla(x, table(), cu_seqlens=torch.tensor([0, *LENGTHS]).cumsum(0))
    grads = torch.autograd.grad(out.square().sum(), [x, *mla.parameters()])
    exact = TrainableMLA(config(q_lora_rank)).double()
    exact.load_state_dict({n: t.double() for n, t in mla.state_dict().items()})
    exact_x = x.detach().double().requires_grad_()
    want = reference(exact, exact_x)
    wanted = torch.autograd.grad(want.square().sum(), [exact_x, *exact.parameters()])
    # fp32 with a float32 RoPE table, six products deep.
    assert relative_error(out, want) < 1e-5
    for got, expected in zip(grads, wanted, strict=True):
        assert relative_error(got, expected) < 1e-5


def test_batched_equals_packed():
    torch.manual_seed(0)
    mla, x = TrainableMLA(config(0)), torch.randn(2, 9, 64)
    flat = mla(x.flatten(0, 1), table(), cu_seqlens=torch.tensor([0, 9, 18]))
    assert torch.equal(mla(x, table()).flatten(0, 1), flat)


def test_cache_spec_holds_one_latent_vector_per_token():
    spec = create_mla_kv_cache_spec(512, 64, block_size=16, dtype=torch.bfloat16)
    assert (spec.num_kv_heads, spec.head_size, spec.block_size) == (1, 576, 16)
    assert spec.page_size_bytes == 16 * 576 * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("q_lora_rank", [0, 24])
def test_it_trains_under_autocast(q_lora_rank, dtype):
    torch.manual_seed(0)
    mla, x = TrainableMLA(config(q_lora_rank)), torch.randn(2, 9, 64)
    want = mla(x, table())
    wanted = torch.autograd.grad(want.square().sum(), mla.parameters())
    with torch.autocast("cpu", dtype):
        out = mla(x, table())
    assert out.dtype == dtype
    grads = torch.autograd.grad(out.float().square().sum(), mla.parameters())
    # bf16 keeps 8 bits, and six products follow one another.
    assert relative_error(out, want) < 2e-2
    for got, expected in zip(grads, wanted, strict=True):
        assert relative_error(got, expected) < 5e-2


@pytest.mark.parametrize("lead", [(0,), (2, 0)])
def test_no_tokens_give_no_output(lead):
    mla = TrainableMLA(config(0))
    assert mla(torch.zeros(*lead, 64), table()).shape == (*lead, 64)


@pytest.mark.parametrize("wrong", [{"qk_rope_head_dim": 15}, {"dropout": 1.5}, {"dropout": -0.1}])
def test_sizes_without_a_meaning_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MLAConfig(hidden_size=64, num_heads=4, **wrong)
